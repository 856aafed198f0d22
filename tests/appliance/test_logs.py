"""The log of a whole process: whatever becomes of its stderr, it goes on, and its last words come out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from bkpool.telemetry.log_file import RotatedFile
from support.unread_pipes import full_pipe, pipe_without_reader

pytestmark = pytest.mark.slow

UNREACHABLE = """
apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: x, user: x}}]
clusters: [{name: x, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: x, user: {}}]
"""
CONFIGURED = """
import os, sys, threading, warnings
from pathlib import Path
import structlog
from bkpool.appliance.logs import configure_logging
configure_logging(Path(os.environ["BKPOOL_HOME"]), 70_000)
log = structlog.get_logger()
"""


def run(script, home, **options):
    """Runs a program that has configured the log. Returns what it has written, unless that goes elsewhere."""
    given = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE} | options
    return subprocess.run(
        [sys.executable, "-c", CONFIGURED + script],
        env={**os.environ, "BKPOOL_HOME": str(home)},
        text=True,
        timeout=300,
        check=False,
        **given,
    )


@pytest.mark.parametrize("stderr", [full_pipe, pipe_without_reader])
def test_nothing_waits_for_a_stderr_that_nobody_reads(tmp_path, stderr):
    script = """
for number in range(20_000):
    log.warning("said", number=number)
warnings.warn("a warning")
print("for the user", file=sys.stderr)
import logging; logging.getLogger("asyncio").error("of a library")
Path(os.environ["BKPOOL_HOME"], "done").touch()
raise SystemExit(3)
"""
    with stderr() as descriptor:
        done = run(script, tmp_path, stderr=descriptor, stdout=descriptor)
    assert done.returncode == 3
    assert (tmp_path / "done").exists()


def test_a_value_that_cannot_be_shown_costs_only_its_line(tmp_path):
    script = """
class Bad:
    def __str__(self): raise ZeroDivisionError
    __repr__ = __str__
log.info("bad", value=Bad())
log.info("bad.key", value={(1, 2): 3})
log.info("after")
"""
    lines = [json.loads(line) for line in run(script, tmp_path).stderr.splitlines()]
    assert [line["event"] for line in lines] == ["bad", "bad.key", "after"]
    assert lines[0] == {"event": "bad", "level": "info", "not_shown": "ZeroDivisionError"}


@pytest.mark.parametrize(
    ("end", "last_words"),
    [
        ("print('error: no room', file=sys.stderr); sys.exit(9)", "error: no room"),
        (
            "from bkpool.appliance.logs import flush; flush(); import ctypes; ctypes.string_at(0)",
            "Fatal Python error: Segmentation fault",
        ),
        ("threading.Thread(target=lambda: 1 / 0).start()", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_was_logged_before_the_end_comes_out_and_before_the_last_words(tmp_path, end, last_words):
    """A crash of the interpreter loses what still waits in the queue. So the program that crashes waits first."""
    done = run(f"log.info('before')\nlog.info('the end')\nsys.stderr.flush()\n{end}\n", tmp_path)
    before, found, _ = done.stderr.partition(last_words)
    assert found, done.stderr
    assert '"the end"' in before


def test_the_log_of_a_process_in_the_background_is_rotated(tmp_path):
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "appliance.log"
    script = """
for number in range(6000):
    log.info("said", number=number)
print("answered", flush=True)
from bkpool.appliance.logs import flush
flush()
os.write(2, b"past the queue\\n")
"""
    with path.open("ab") as output:
        assert run(script, tmp_path, stderr=output, stdout=output).returncode == 0
    files = [path, *(path.with_name(f"appliance.log.{number}") for number in range(1, 5))]
    assert sorted(path.parent.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 70_100 for file in files)
    lines = "".join(file.read_text() for file in reversed(files)).splitlines()
    assert lines[-2:] == ["answered", "past the queue"]
    numbers = [json.loads(line)["number"] for line in lines[:-2]]
    assert numbers == list(range(numbers[0], 6000))
    assert numbers[0] > 0


def test_a_file_that_cannot_be_rotated_is_still_written(tmp_path):
    path = tmp_path / "log"
    (tmp_path / "log.new").mkdir()  # where the next file would be made
    with path.open("ab") as file:
        rotated = RotatedFile(path, [file.fileno()], size=10)
        assert [rotated.write(b"12345678\n") for _ in range(3)] == [9, 9, 9]
    assert path.read_bytes() == b"12345678\n" * 3


def test_a_file_that_was_moved_away_is_made_again(tmp_path):
    path = tmp_path / "log"
    with path.open("ab") as file:
        rotated = RotatedFile(path, [file.fileno()], size=10)
        rotated.write(b"12345678\n")
        path.rename(tmp_path / "elsewhere")
        rotated.write(b"after\n")
        rotated.write(b"again\n")
    assert (tmp_path / "elsewhere").read_bytes() == b"12345678\n"
    assert (path.read_bytes(), (tmp_path / "log.1").read_bytes()) == (b"again\n", b"after\n")


def test_a_file_that_was_removed_with_its_directory_is_made_again_at_the_next_line(tmp_path):
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    with path.open("ab") as file:
        rotated = RotatedFile(path, [file.fileno()], size=1000)
        rotated.write(b"before\n")
        shutil.rmtree(path.parent)
        rotated.write(b"after\n")
    assert path.read_bytes() == b"after\n"
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_home_that_was_removed_is_not_made_again_for_its_log(tmp_path):
    path = tmp_path / "home" / "logs" / "log"
    path.parent.mkdir(parents=True)
    with path.open("ab") as file:
        rotated = RotatedFile(path, [file.fileno()], size=1000)
        shutil.rmtree(tmp_path / "home")
        assert rotated.write(b"after\n") == 6
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("stderr", ["None", "io.StringIO()"])
def test_a_process_without_a_descriptor_for_stderr_runs(stderr):
    script = f"""
import io, sys
sys.stderr = {stderr}
import structlog
from bkpool.appliance.logs import configure_logging, flush
configure_logging()
structlog.get_logger().info("said")
flush()
print(sys.stderr and sys.stderr.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr == ""
    assert ('"event": "said"' in done.stdout) is (stderr != "None")


@pytest.mark.parametrize("reads_on", [True, False])
def test_sigterm_ends_a_replica_that_waits_for_its_cluster(tmp_path, reads_on):
    """Whether somebody still reads its stderr or not."""
    (tmp_path / "kubeconfig").write_text(UNREACHABLE)
    addresses = [f"--{name}-address=127.0.0.1:0" for name in ("gateway", "metrics")]
    options = ["--roles", "gateway", "--pool", "a/b", "--kubeconfig", str(tmp_path / "kubeconfig"), *addresses]
    with subprocess.Popen(
        [sys.executable, "-m", "bkpool", "up", *options],
        env={**os.environ, "BKPOOL_HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as replica:
        try:
            assert next(line for line in replica.stderr if b"mirror.interrupted" in line)
            if not reads_on:
                replica.stderr.close()
            replica.terminate()
            replica.communicate(timeout=60)
        finally:
            replica.kill()
    assert replica.returncode == 0
