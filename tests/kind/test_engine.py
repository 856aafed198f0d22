"""Whether a container engine answers, and the reason if not."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault
from bkpool.kind import engine
from bkpool.kind.engine import Engine, engine_fault

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def left_by_the_sdk() -> Iterator[None]:
    """The SDK leaves a socket open if it could not connect. This collects it, so no other test gets the warning."""
    yield
    gc.collect()


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that nothing accepts on, like that of an engine that hangs."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "engine.sock"))
        listening.listen()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")
        monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
        monkeypatch.delenv("DOCKER_CERT_PATH", raising=False)
        yield listening


def test_the_reason_is_given_if_there_is_no_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    assert engine_fault() == "no container engine answers (No such file or directory)"


def test_an_engine_that_hangs_is_given_up_soon(listener, monkeypatch):
    monkeypatch.setattr(engine, "_PROBE_SECONDS", 0.2)
    fault = engine_fault() or ""
    assert fault.startswith("no container engine answers")
    assert "(read timeout=0.2)" in fault


def test_the_current_context_of_the_cli_is_used(tmp_path, monkeypatch):
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text('{"currentContext": "mine"}')
    meta = tmp_path / "contexts" / "meta" / hashlib.sha256(b"mine").hexdigest() / "meta.json"
    meta.parent.mkdir(parents=True)
    endpoint = {"Host": f"unix://{tmp_path}/mine.sock", "SkipTLSVerify": False}
    meta.write_text(json.dumps({"Name": "mine", "Metadata": {}, "Endpoints": {"docker": endpoint}}))
    assert engine_fault() == "no container engine answers (No such file or directory)"

    meta.write_text("{")
    assert "corrupted meta file for context mine" in (engine_fault() or "")


def test_a_denied_socket_is_a_permission_fault_with_a_hint(monkeypatch):
    refused = ConnectionError("Connection aborted.")
    refused.__cause__ = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    fault = engine._no_engine(refused)
    assert fault.code == "Permission"
    assert "usermod -aG docker" in fault.hint


def test_an_engine_without_its_command_line_program_is_refused(monkeypatch):
    class Client:
        closed = False

        def close(self) -> None:
            self.closed = True

    client = Client()
    monkeypatch.setattr(engine.docker, "from_env", lambda **_: client)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(HostFault, match=r"docker.* is not on PATH") as raised:
        Engine.connect()
    assert raised.value.code == "ToolMissing"
    assert client.closed


def test_a_program_in_a_node_that_does_not_end_is_given_up(monkeypatch):
    """The SDK waits for its output without a limit."""
    go_on = threading.Event()

    class Containers:
        def get(self, _node: str) -> Containers:
            return self

        def exec_run(self, _command: list[str], *, demux: bool) -> tuple[int, tuple[bytes | None, bytes | None]]:
            assert demux
            assert go_on.wait(30)
            return 0, (b"answer", None)

    class Client:
        containers = Containers()

    monkeypatch.setattr(engine, "_TIMEOUT", 0.2)
    with pytest.raises(HostFault, match=r"`crictl inspecti x:1` in the node n has not ended after 0 s") as raised:
        Engine(Client()).run("n", ["crictl", "inspecti", "x:1"])  # type: ignore[arg-type]
    assert "docker ps" in raised.value.hint
    go_on.set()
    monkeypatch.setattr(engine, "_TIMEOUT", 30.0)
    assert Engine(Client()).run("n", ["true"]) == "answer"  # type: ignore[arg-type]
