"""Threads for work on files, in groups: a disk that hangs takes the threads of one group, and no others.

The threads of the event loop itself look up names, so nothing that may take long runs in them. A thread here does not
keep the process from ending. It never decides how long somebody waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Task(NamedTuple):
    future: Future[Any]
    work: Callable[[], Any]


@dataclass(slots=True)
class _Group:
    """The threads between two calls of `close`."""

    jobs: queue.SimpleQueue[_Task | None] = field(default_factory=queue.SimpleQueue)
    count: int = 0
    free: int = 0
    """Threads that wait for work, less the work that waits for them."""


class Threads:
    """A group of threads. Each is made when it is needed. What finds none free waits for its turn.

    Args:
        name: Of the group; for people who look at the process.
        number: How many there are at most.
    """

    def __init__(self, name: str, number: int) -> None:
        self._name = name
        self._number = number
        self._lock = threading.Lock()
        self._group = _Group()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a function in a thread. The future can be cancelled until it begins."""
        future: Future[T] = Future()
        with self._lock:
            group = self._group
            group.jobs.put(_Task(future, partial(function, *args, **kwargs)))
            group.free -= 1
            if group.free < 0 and group.count < self._number:
                group.count += 1
                group.free += 1
                name = f"{self._name} {group.count}"
                threading.Thread(target=self._main, args=[group], name=name, daemon=True).start()
        return future

    def close(self) -> None:
        """Ends the threads once they have nothing to do. Later work gets new ones."""
        with self._lock:
            group, self._group = self._group, _Group()
            for _ in range(group.count):
                group.jobs.put(None)

    def _main(self, group: _Group) -> None:
        while (job := group.jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                try:
                    result = job.work()
                except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                    job.future.set_exception(error)
                else:
                    job.future.set_result(result)
                    del result
            del job
            with self._lock:
                group.free += 1
