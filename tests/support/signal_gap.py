"""A signal that arrives in the gap between Python's last look for signals and a system call.

The call is then not interrupted, and the handler runs only when the call returns. In a real program the gap is a few
instructions long; here a signal arrives in it every time.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from functools import partial
from threading import current_thread, main_thread
from typing import Any

_RAISE = ctypes.CDLL(None)["raise"]
"""raise(3). Unlike signal.raise_signal it runs no handler of Python."""


def with_signal_before(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A function that does the same as one of C, but a signal arrives just before its first call in the main thread.

    Nothing between the signal and the call is an instruction of Python: `map` and `partial` are C too.

    Args:
        call: A function that waits in a system call.
        number: The signal.
    """
    signals = [number]

    def run(*args: Any, **options: Any) -> Any:
        calls = [partial(call, *args, **options)]
        if signals and current_thread() is main_thread():
            calls.insert(0, partial(_RAISE, signals.pop()))
        return list(map(operator.call, calls))[-1]

    return run
