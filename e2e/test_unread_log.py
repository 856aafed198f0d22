"""`bkpool up` in the foreground whose stderr nobody reads: leases and builds work, and nothing is left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from harness import WAIT_TIMEOUT, Appliance, Context, eventually, only_on, really_ran
from support.unread_pipes import full_pipe, pipe_without_reader

pytestmark = only_on("process", "what is tested is the log of a process on this machine")


@pytest.mark.parametrize("stderr", [full_pipe, pipe_without_reader])
def test_everything_works_and_down_ends(
    make_appliance: Callable[[], Appliance], context: Context, stderr: Callable[[], AbstractContextManager[int]]
) -> None:
    appliance = make_appliance()
    command = [*appliance.program, "up", *appliance.world.options(), *appliance.addresses]
    with stderr() as descriptor:
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
