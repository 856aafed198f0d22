"""The callbacks of those who want to know that something has changed. Each of them can be removed again.

It does no I/O. The store's copy in memory, the runtimes and the gateways of pools report their changes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

P = ParamSpec("P")


class Subscribers(Generic[P]):
    """Callbacks, called in the order in which they were added. Use it in one thread.

    A callback may add and end subscriptions. If the same callback is added twice, these are two subscriptions.
    """

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[P, None]] = {}

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, callback: Callable[P, None]) -> Callable[[], None]:
        """Adds a callback.

        Returns:
            A function that unsubscribes: the callback is not called any more, also not for a change that is being
            reported at that moment. To call the function again does nothing.
        """
        token = object()
        self._callbacks[token] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(token, None)

        return unsubscribe

    def notify(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls every callback that was there when the call began and has not been unsubscribed meanwhile."""
        for token, callback in tuple(self._callbacks.items()):
            if token in self._callbacks:
                callback(*args, **kwargs)
