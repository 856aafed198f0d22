"""Lines go through a queue and a thread. Whatever happens to where they go, nobody waits and nothing fails."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from bkpool.telemetry.log_writer import DescriptorSink, LineLogger, LogWriter, QueuedText

TIMEOUT = 60.0
LONG = "x" * 200_000 + "\n"  # more than a pipe takes


class HeldSink:
    """A sink that keeps what it gets, waits while it is shut, and takes `room` more bytes."""

    def __init__(self):
        self.written = b""
        self.room = 1_000_000
        self.open = threading.Event()
        self.open.set()
        self.called = threading.Event()

    def write(self, data):
        self.called.set()
        assert self.open.wait(TIMEOUT)
        taken = data[: self.room]
        self.room -= len(taken)
        self.written += taken
        return len(taken)


@pytest.fixture
def sink():
    return HeldSink()


@pytest.fixture
def lost():
    return []


@pytest.fixture
def open_writer():
    """Makes writers whose threads end with the test."""
    with ExitStack() as writers:

        def make(*args, **options):
            writer = LogWriter(*args, **options)
            writers.callback(writer.close)
            return writer

        yield make


@pytest.fixture
def writer(open_writer, sink, lost):
    return open_writer(sink, capacity=100, on_lost=lost.append)


@pytest.fixture
def pipe():
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb", buffering=0) as reader, os.fdopen(theirs, "wb", buffering=0) as writer:
        yield reader, writer


def test_lines_are_written_in_their_order_and_counted_as_lost_if_there_is_no_room(writer, sink, lost):
    sink.open.clear()
    writer.write("first\n")
    assert sink.called.wait(TIMEOUT)
    for number in range(40):
        writer.write(f"line {number:4}\n")  # ten bytes, of which nine fit beside the first line
    assert writer.lost == 31
    assert not writer.flush(0)
    sink.open.set()
    assert writer.flush(TIMEOUT)
    assert sink.written.decode().splitlines() == ["first", *(f"line {number:4}" for number in range(9))]
    writer.write("after\n")
    assert writer.flush(TIMEOUT)
    assert sink.written.endswith(b"after\n")
    assert lost == [31]


@pytest.mark.parametrize("together", [True, False])
def test_what_a_full_disk_takes_no_more_is_counted_and_reported_when_it_takes_lines_again(
    writer, sink, lost, together
):
    sink.room = 8
    if together:
        writer.write("whole\ncut\nlost\n")
    else:
        writer.write("whole\ncut\n")
        assert writer.flush(TIMEOUT)
        writer.write("lost\n")
    assert writer.flush(TIMEOUT)
    assert (sink.written, writer.lost, lost) == (b"whole\ncu", 2, [])
    sink.room = 1000
    writer.write("after\n")
    assert writer.flush(TIMEOUT)
    assert (sink.written, lost) == (b"whole\ncu\nafter\n", [2])


def test_a_report_that_is_lost_itself_brings_about_no_other(open_writer, sink):
    writer = open_writer(sink, on_lost=lambda n: writer.write(f"{n} lost\n"))
    sink.room = 0
    writer.write("lost\n")
    assert writer.flush(TIMEOUT)
    sink.room = len("after\n")
    writer.write("after\n")
    assert writer.flush(TIMEOUT)
    assert writer.flush(TIMEOUT)  # the report, which finds no room
    assert (sink.written, writer.lost) == (b"after\n", 2)


def test_a_sink_or_report_that_fails_does_not_end_the_thread(open_writer, sink):
    def fail(_):
        raise ZeroDivisionError

    writer = open_writer(sink, on_lost=fail)
    sink.write, works = fail, sink.write
    writer.write("lost\n")
    assert writer.flush(TIMEOUT)
    sink.write = works
    writer.write("its report fails\n")
    writer.write("after\n")
    assert writer.flush(TIMEOUT)
    assert sink.written == b"its report fails\nafter\n"


def test_a_reader_who_has_gone_is_not_an_error(open_writer, pipe):
    reader, end = pipe
    writer = open_writer(DescriptorSink(end.fileno()), on_lost=lambda _: None)
    writer.write("read\n")
    assert reader.read(100) == b"read\n"
    reader.close()
    writer.write("lost\n")
    writer.write(LONG)
    assert writer.flush(TIMEOUT)
    assert writer.lost == 2


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_who_does_not_read_stops_nobody_and_gets_all_later(open_writer, pipe, blocking):
    reader, end = pipe
    os.set_blocking(end.fileno(), blocking)
    writer = open_writer(DescriptorSink(end.fileno()), on_lost=lambda _: None)
    writer.write(LONG)
    writer.write("after\n")
    assert not writer.flush(0.01)
    got = b""
    while not got.endswith(b"after\n"):
        got += reader.read(65536)
    assert got.decode() == LONG + "after\n"


def test_a_closed_writer_writes_what_was_queued_and_its_thread_ends(sink):
    before = set(threading.enumerate())
    writer = LogWriter(sink, on_lost=lambda _: None)
    (thread,) = set(threading.enumerate()) - before
    sink.open.clear()
    writer.write("queued\n")
    writer.close()
    sink.open.set()
    thread.join(TIMEOUT)
    assert (thread.is_alive(), sink.written) == (False, b"queued\n")


def test_text_for_stderr_is_queued_in_whole_lines_and_at_a_flush(writer, sink):
    with Path(os.devnull).open("w") as original:
        text = QueuedText(writer, original)
        print("one", "two", file=text)
        text.write("three\nfo")
        writer.write("between\n")
        text.write("ur\n")
        print("\ud800 spinner", end="", file=text, flush=True)
        assert writer.flush(TIMEOUT)
        assert sink.written.decode() == "one two\nthree\nbetween\nfour\n\\ud800 spinner"
        assert text.fileno() == original.fileno()
        assert not text.isatty()


def test_a_logger_whose_line_cannot_be_written_raises_nothing():
    LineLogger(lambda _: 1 / 0).warning("lost")
