"""Configures the log of an appliance: what a line looks like, and where it goes.

Everything that this process writes to stderr goes through one queue and one thread (`telemetry.log_writer`): log
lines, warnings, tracebacks and messages for the user. So nothing that it does waits for a disk, a pipe or a terminal.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import sys
from contextlib import suppress
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

from bkpool.gateway.net.tls_context import ignore_invalid_server_names
from bkpool.telemetry.log_file import RotatedFile, is_open_as
from bkpool.telemetry.log_writer import DescriptorSink, LineLogger, LogSink, LogWriter, QueuedText, TextSink

FLUSH_TIMEOUT = 2.0
"""Seconds that the end of the process waits until its last lines are written: a pipe may have no reader."""

log = structlog.get_logger(__name__)

_writer: LogWriter | None = None  # a process has one stderr, so it has one log


def configure_logging(home: Path | None = None, size: int = 0) -> LogWriter:
    """Writes readable lines on a terminal and JSON elsewhere, and leaves out debug messages.

    If stderr is the log file of the home, as for `up -d`, the file is rotated.

    Args:
        home: BKPOOL_HOME.
        size: Bytes that the log file of the home has at most.
    """
    global _writer  # noqa: PLW0603 - see above
    original = sys.stderr
    on_terminal = original is not None and original.isatty()
    descriptor = _descriptor(original)
    sys.unraisablehook = ignore_invalid_server_names
    writer = LogWriter(_sink(original, descriptor, home, size), on_lost=_report_lost)
    atexit.register(writer.flush, FLUSH_TIMEOUT)
    if descriptor is not None:
        if not faulthandler.is_enabled():
            faulthandler.enable(descriptor)
        _queue_answers(writer, descriptor)
        sys.stderr = cast("TextIO", QueuedText(writer, original))
    logger = LineLogger(writer.write)  # one for all modules
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, _safe(_renderers(on_terminal=on_terminal))],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_names: logger,
        cache_logger_on_first_use=True,
    )
    _writer = writer
    return writer


def lines_lost() -> int:
    """How many lines of this process's log were lost until now."""
    return _writer.lost if _writer is not None else 0


def flush() -> None:
    """Waits, for a bounded time, until what was logged is written. For the moment before the process is ended."""
    if _writer is not None:
        _writer.flush(FLUSH_TIMEOUT)


def log_file(home: Path) -> Path:
    """The log of an appliance in the background."""
    return home / "logs" / "appliance.log"


def _report_lost(lines: int) -> None:
    log.warning("log.lines_lost", lines=lines)


def _renderers(*, on_terminal: bool) -> list[Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(default=str),
    ]


def _safe(renderers: list[Processor]) -> Processor:
    """All of them in one. A value that none of them can show costs the other values of its line, and nothing else."""

    def render(logger: Any, method: str, event: EventDict) -> str:
        name = str(event.get("event"))
        try:
            shown: Any = event
            for renderer in renderers:
                shown = renderer(logger, method, shown)
            return str(shown)
        except Exception as error:  # noqa: BLE001 - what is logged has happened, and goes on
            return json.dumps({"event": name, "level": method, "not_shown": type(error).__name__})

    return render


def _descriptor(stderr: TextIO | None) -> int | None:
    if stderr is None:  # the process was started without one, and its number may belong to another file by now
        return None
    with suppress(UnsupportedOperation):
        return stderr.fileno()
    return None


def _queue_answers(writer: LogWriter, stderr: int) -> None:
    """Nobody has to wait for stdout either: `up` writes its answer there while it already serves."""
    descriptor = _descriptor(sys.stdout)
    if descriptor is None:
        return
    if not os.path.samestat(os.fstat(descriptor), os.fstat(stderr)):
        writer = LogWriter(DescriptorSink(descriptor), on_lost=lambda _lines: None)
        atexit.register(writer.flush, FLUSH_TIMEOUT)
    sys.stdout = cast("TextIO", QueuedText(writer, sys.stdout))


def _sink(stderr: TextIO | None, descriptor: int | None, home: Path | None, size: int) -> LogSink:
    if stderr is not None and descriptor is None:  # a program that runs bkpool within itself has replaced it
        return TextSink(stderr)
    if home is not None and descriptor is not None and is_open_as(path := log_file(home), descriptor):
        same = [number for number in (1, 2) if number != descriptor and is_open_as(path, number)]
        return RotatedFile(path, [descriptor, *same], size=size)
    return DescriptorSink(descriptor)
