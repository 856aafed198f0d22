"""The limit of open files in processes of their own: it is raised here, and not in what they start."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from bkpool.core.errors import HostFault
from bkpool.toolchain.descriptor_limit import HIGHEST, highest, or_too_many_open_files

pytestmark = pytest.mark.slow

PROGRAM = """
import json, resource, subprocess
from bkpool.toolchain.descriptor_limit import raise_limit, current_limit, with_limit_at_start
show = ["/bin/sh", "-c", 'echo "$(ulimit -Sn) $(ulimit -Hn) $0"', "an argument with $HOME"]
limits = [raise_limit() and list(resource.getrlimit(resource.RLIMIT_NOFILE)) for _ in range(2)]
child = subprocess.run(with_limit_at_start(show), capture_output=True, text=True, check=True).stdout
print(json.dumps([limits[1], current_limit(), child.strip()]))
"""


def limited(soft: int, hard: int) -> list[object]:
    done = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" -c "$1"', sys.executable, PROGRAM],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("soft", "hard"), [(256, 1024), (1024, 4096), (512, 512)])
def test_the_soft_limit_is_raised_and_a_worker_gets_that_of_the_start(soft, hard):
    assert limited(soft, hard) == [[hard, hard], hard, f"{soft} {hard} an argument with $HOME"]


def test_no_limit_counts_as_the_highest():
    assert highest(resource.RLIM_INFINITY) == HIGHEST == highest(HIGHEST + 1)
    assert highest(1024) == 1024


def test_a_program_that_lacks_descriptors_is_no_reason_for_another_hint():
    lack = HostFault("pasta: Couldn't open /dev/null: Too many open files", hint="Run `bkpool doctor`.")
    assert "ulimit -Hn" in or_too_many_open_files(lack).hint
    other = HostFault("pasta: Permission denied", hint="Run `bkpool doctor`.")
    assert or_too_many_open_files(other) is other
