"""Writes the log of a process in a thread of its own, so that no other thread waits for a disk, pipe or terminal.

Lines wait in a queue of bounded size. A line that finds no room, or that cannot be written, is lost and counted; once
a line could be written again, one line says how many were lost. Nothing here raises an error, and nothing retries.
"""

from __future__ import annotations

import io
import os
import queue
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TextIO

CAPACITY = 4 * 1024 * 1024
"""Bytes of lines that may wait: some 10,000 lines, a few minutes of a busy appliance."""
BATCH = 64 * 1024
"""Bytes that are written at once when lines wait."""


class LogSink(Protocol):
    """Where lines go. Only the thread of the writer calls it."""

    def write(self, data: bytes) -> int:
        """Writes the data, however long that takes. Returns how many bytes of it were written."""


class LogWriter:
    """The queue and its thread, which ends with the process if nobody closes it.

    Args:
        sink: Where lines go.
        capacity: Bytes of lines that may wait.
        on_lost: Called in the thread with the number of lines that were lost, once a line was written again.
    """

    def __init__(self, sink: LogSink, *, capacity: int = CAPACITY, on_lost: Callable[[int], None]) -> None:
        self._sink = sink
        self._capacity = capacity
        self._on_lost = on_lost
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        # A signal handler or a finalizer may log while its own thread is in here.
        self._lock = threading.RLock()
        self._waiting = 0
        self._lost = 0
        self._reported = 0
        self._is_cut = False
        self._ended = False
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @property
    def lost(self) -> int:
        """The number of lines that were lost until now. It only grows."""
        return self._lost

    def write(self, text: str) -> None:
        """Queues one or more whole lines. It never waits."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._waiting + len(data) > self._capacity:
                self._lost += max(1, data.count(b"\n"))
                return
            self._waiting += len(data)
        self._queue.put(data)

    def flush(self, timeout: float) -> bool:
        """Waits until everything that is queued now is written or lost.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether that happened in time.
        """
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout)

    def close(self) -> None:
        """Ends the thread once everything that is queued now is written or lost. Later lines are never written."""
        self._queue.put(None)

    def _run(self) -> None:
        while not self._ended:
            data, done = self._next_batch()
            try:
                # Only when a line was written: a report that is lost itself would bring about the next one.
                if data and self._write(data):
                    self._report_lost()
            except Exception:  # noqa: BLE001 - there is no other place to report it, and the next line may succeed
                self._count_lost(data)
            finally:
                with self._lock:
                    self._waiting -= len(data)
                if done is not None:
                    done.set()

    def _next_batch(self) -> tuple[bytes, threading.Event | None]:
        """The lines that wait, up to some size, and the flush that follows them if one does."""
        lines: list[bytes] = []
        size = 0
        while size < BATCH:
            try:
                item = self._queue.get(block=not lines)
            except queue.Empty:
                break
            if item is None:
                self._ended = True
                break
            if isinstance(item, threading.Event):
                return b"".join(lines), item
            lines.append(item)
            size += len(item)
        return b"".join(lines), None

    def _write(self, data: bytes) -> bool:
        """Writes lines, and returns whether all of them were written."""
        # The rest of a line may have been lost. The next line must still begin at the left.
        end_of_last = b"\n" if self._is_cut else b""
        whole = end_of_last + data
        written = self._sink.write(whole)
        if written == len(whole):
            self._is_cut = False
            return True
        if written:
            self._is_cut = not whole[:written].endswith(b"\n")
        self._count_lost(data[max(written - len(end_of_last), 0) :])
        return False

    def _count_lost(self, data: bytes) -> None:
        with self._lock:
            self._lost += max(1, data.count(b"\n"))

    def _report_lost(self) -> None:
        new, self._reported = self._lost - self._reported, self._lost
        if new:
            with suppress(Exception):
                self._on_lost(new)


class DescriptorSink:
    """A file, pipe or terminal.

    Args:
        descriptor: Open for writing. None loses everything: the process was started without one.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> int:
        """See LogSink. A reader who does not read makes it wait; one who has gone, or a full disk, ends it."""
        if self._descriptor is None:
            return 0
        written = 0
        while written < len(data):
            try:
                written += os.write(self._descriptor, data[written:])
            except BlockingIOError:  # another program that has the same pipe wants it non-blocking
                self._wait_until_writable(self._descriptor)
            except OSError:
                break
        return written

    def _wait_until_writable(self, descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        poll.poll()


class TextSink:
    """An object in memory, by which a program that runs bkpool within itself has replaced stderr."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """See LogSink."""
        self._file.write(data.decode())
        return len(data)


class QueuedText(io.TextIOBase):
    """A text file that hands its lines to a writer: a stderr that nobody has to wait for.

    Args:
        writer: Gets the lines.
        original: What it stands for; a terminal stays one.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: LogWriter, original: TextIO) -> None:
        self._writer = writer
        self._original = original
        self._partial = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Queues whole lines. The beginning of a line waits for its end, or for `flush`."""
        with self._lock:
            lines, newline, self._partial = (self._partial + text).rpartition("\n")
            if newline or len(self._partial) > BATCH:
                self._writer.write(lines + newline if newline else self._take_partial())
        return len(text)

    def flush(self) -> None:
        """Queues what was written. It does not wait until that is on its way."""
        with self._lock:
            if self._partial:
                self._writer.write(self._take_partial())

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether it stands for a terminal."""
        return self._original.isatty()

    def fileno(self) -> int:
        """The descriptor that it stands for. Who writes to it writes past the queue."""
        return self._original.fileno()

    def close(self) -> None:
        """Does nothing: a program that closes its stderr would lose its last words."""
        self.flush()

    def _take_partial(self) -> str:
        partial, self._partial = self._partial, ""
        return partial


class LineLogger:
    """What structlog calls with each finished line. It never raises an error.

    Args:
        write: Gets the line with its end.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def msg(self, line: str) -> None:
        """Writes a line."""
        with suppress(Exception):  # there is no place to report it
            self._write(f"{line}\n")

    debug = info = warning = warn = error = critical = fatal = exception = log = msg
