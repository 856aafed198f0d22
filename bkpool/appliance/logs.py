"""Configures the log of a process. A line that cannot be written is lost: it never ends or stops the process."""

from __future__ import annotations

import logging
import os
import select
import sys
from io import UnsupportedOperation
from typing import TextIO, cast

import structlog

from bkpool.gateway.net.tls_context import ignore_invalid_server_names

WRITE_TIMEOUT = 1.0
"""Seconds that a line waits for a reader who does not read. The lines after it do not wait, until they read again."""


class LogStream:
    """Writes text to a descriptor. A reader who has gone, or does not read, is not an error.

    Args:
        descriptor: Where to write; None writes nothing.
        timeout: Seconds to wait for a reader who does not read.
    """

    def __init__(self, descriptor: int | None, *, timeout: float = WRITE_TIMEOUT) -> None:
        self._descriptor = descriptor
        self._timeout = timeout
        self._waits = True
        self._is_cut = False
        self._poll = select.poll()
        if descriptor is not None:
            self._poll.register(descriptor, select.POLLOUT)

    def write(self, text: str) -> None:
        """Writes one or more whole lines, or as much of them as is possible."""
        if self._descriptor is None:
            return
        # The rest of a line may be lost. The next line must still begin at the left.
        data = (("\n" if self._is_cut else "") + text).encode(errors="backslashreplace")
        size = len(data)
        try:
            while data and self._is_writable():
                # A pipe that is writable takes this much at once.
                data = data[os.write(self._descriptor, data[: select.PIPE_BUF]) :]
        except OSError:
            pass  # the reader has gone, or the disk is full: there is no place to report it
        self._is_cut = (self._is_cut and len(data) == size) or 0 < len(data) < size

    def flush(self) -> None:
        """Does nothing: `write` keeps nothing back."""

    def _is_writable(self) -> bool:
        self._waits = bool(self._poll.poll(self._timeout * 1000 if self._waits else 0))
        return self._waits


def configure_logging() -> None:
    """Writes readable lines on a terminal and JSON into a pipe. Debug messages are left out."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    sys.unraisablehook = ignore_invalid_server_names
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(_stderr()),
        cache_logger_on_first_use=True,
    )


def _stderr() -> TextIO:
    if sys.stderr is None:  # the process was started without one, and its number may belong to another file by now
        return cast("TextIO", LogStream(None))
    try:
        return cast("TextIO", LogStream(sys.stderr.fileno()))  # loggers only write and flush
    except UnsupportedOperation:  # a program that runs bkpool within itself has replaced it by an object in memory
        return sys.stderr
