"""What a test logs. structlog captures what the whole process logs, also in threads that earlier tests have left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.testing import capture_logs as capture_all
from structlog.typing import EventDict, Processor

_of_earlier_tests: set[threading.Thread] = set()


def begin_test() -> None:
    """Remembers the threads that run already: nothing that they log belongs to the test that begins."""
    _of_earlier_tests.clear()
    _of_earlier_tests.update(set(threading.enumerate()) - {threading.current_thread()})


@contextmanager
def capture_logs(processors: Iterable[Processor] = ()) -> Iterator[list[Any]]:
    """The same as that of structlog, without the lines of threads that earlier tests have left."""
    with capture_all(processors=[_only_of_this_test, *processors]) as lines:
        yield lines


def _only_of_this_test(_logger: object, _method: str, event: EventDict) -> EventDict:
    if threading.current_thread() in _of_earlier_tests:
        raise structlog.DropEvent
    return event


def forget_cached_loggers() -> None:
    """Makes the loggers of bkpool follow the configuration again. An appliance in this process has fixed theirs."""
    proxy = type(structlog.get_logger())
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "bkpool":
            for value in list(vars(module).values()):
                if type(value) is proxy:
                    vars(value).pop("bind", None)
