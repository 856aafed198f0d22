"""Work in a thread of its own, so that a signal or a time-out ends the wait for it.

For calls that neither of them interrupts, such as the look-up of a name in the C library. A thread that nobody waits
for any more ends with the process.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], timeout: float | None = None) -> T:
    """Does some work in a thread, and returns its result or raises its error.

    Args:
        work: What to do.
        timeout: Seconds to wait for it; None for no limit.

    Raises:
        TimeoutError: The work has not ended in time.
    """
    results: list[T] = []
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as fault:  # noqa: BLE001 - the thread of the caller raises it
            ended.put(fault)
        else:
            ended.put(None)

    Thread(target=run, daemon=True).start()
    try:
        fault = ended.get(timeout=timeout)
    except Empty:
        raise TimeoutError from None
    if fault is not None:
        raise fault
    return results[0]
