"""A log line that cannot be written is lost, and nothing else happens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bkpool.appliance.logs import LogStream

UNREACHABLE = """
apiVersion: v1
kind: Config
current-context: x
contexts: [{name: x, context: {cluster: x, user: x}}]
clusters: [{name: x, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: x, user: {}}]
"""
LONG = "x" * 200_000 + "\n"  # more than a pipe takes


@pytest.fixture
def pipe():
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb", buffering=0) as reader, os.fdopen(theirs, "wb", buffering=0) as writer:
        yield reader, writer


def test_a_reader_who_has_gone_is_not_an_error(pipe):
    reader, writer = pipe
    stream = LogStream(writer.fileno())
    stream.write("read\n")
    assert reader.read(100) == b"read\n"
    reader.close()
    stream.write("lost\n")
    stream.write(LONG)


def test_a_reader_who_does_not_read_stops_nothing_and_gets_whole_lines_later(pipe):
    reader, writer = pipe
    stream = LogStream(writer.fileno(), timeout=0.001)
    stream.write(LONG)
    stream.write("lost\n")
    os.set_blocking(reader.fileno(), False)
    while chunk := reader.read(65536):
        assert set(chunk) == {ord("x")}
    stream.write("after\n")
    stream.write("and after\n")
    assert reader.read(100) == b"\nafter\nand after\n"


def test_long_lines_and_characters_without_a_code_are_written(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        stream = LogStream(file.fileno())
        stream.write(LONG)
        stream.write("\udcff\n")
    assert (tmp_path / "log").read_text() == LONG + "\\udcff\n"


@pytest.mark.parametrize("stderr", ["None", "io.StringIO()"])
def test_a_process_without_a_descriptor_for_stderr_runs(stderr):
    script = f"""
import io, sys
sys.stderr = {stderr}
import structlog
from bkpool.appliance.logs import configure_logging
configure_logging()
structlog.get_logger().info("said")
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
