"""`bkpool up` in the foreground whose stderr nobody reads: leases and builds work, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from harness import WAIT_TIMEOUT, Appliance, Context, eventually, only_on, really_ran

pytestmark = only_on("process", "what is tested is the log of a process on this machine")


@contextmanager
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that is full and that nobody reads."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def pipe_without_reader() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@pytest.mark.parametrize("stderr", [full_pipe, pipe_without_reader])
def test_everything_works_and_down_ends(
    make_appliance: Callable[[], Appliance], context: Context, stderr: Callable[[], Iterator[int]]
) -> None:
    appliance = make_appliance()
    command = [*appliance.program, "up", *appliance.world.options(), *appliance.addresses]
    with stderr() as descriptor:  # type: ignore[attr-defined]
        process = subprocess.Popen(command, env=appliance.env, stdout=descriptor, stderr=descriptor)
        try:
            eventually((appliance.home / "appliance.json").exists, "it is ready")
            builder = appliance.builder(appliance.allocate(), "unread")
            assert really_ran(
                appliance.build(builder, context.dockerfile("say nobody-reads-the-log")), "nobody-reads-the-log"
            )
            for _ in range(5):
                appliance.release(appliance.cli("allocate").ok().json).ok()
            appliance.cli("revoke", "--pool", "default").ok()
            eventually(lambda: appliance.pool()["allocated"] == 0, "no lease is left")
            if stderr is pipe_without_reader:
                lost = next(
                    line for line in appliance.metrics().splitlines() if line.startswith("bkpool_log_lines_lost_")
                )
                assert float(lost.split()[1]) > 0
            assert appliance.cli("down").ok().json["stopped"]
            assert process.wait(WAIT_TIMEOUT) == 0
        finally:
            process.kill()
            process.wait()
