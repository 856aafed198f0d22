"""The age of issuers' keys counts while the machine sleeps: seen in a real time namespace (time_namespaces(7))."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SLEPT = 864_000
PROGRAM = """
import time
from contextlib import AsyncExitStack
from bkpool.appliance.access_control import open_issuers
from bkpool.settings.model import IdentitySettings
print(open_issuers(AsyncExitStack(), IdentitySettings())._clock() - time.monotonic())
"""


def test_keys_grow_old_while_the_machine_sleeps():
    """In the namespace the clock that counts a sleep is ten days ahead of the one that does not."""
    unshare = shutil.which("unshare")
    assert unshare, "install the package util-linux"
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = [unshare, *as_root, "--time", f"--boottime={SLEPT}", "--fork", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if "unshare failed" in done.stderr:
        pytest.skip(f"this user cannot make a time namespace: {done.stderr.strip()}")
    assert float(done.stdout) > SLEPT - 1
