from __future__ import annotations

import hashlib
import io
import json
import os
import ssl
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bkpool.toolchain.table import RELEASES, Release, Tool, release_of


def script(words: str) -> bytes:
    """A real program that says these words."""
    return f"#!/bin/sh\necho '{words}'\n".encode()


def words(release: Release, version: str) -> str:
    return f"{release.banner} v{version} {release.feature}"


class Releases:
    """A web server on loopback with releases as github.com has them; what it serves can be spoiled."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        for release in RELEASES:
            self.publish(release)

    def use_tls(self, context: ssl.SSLContext) -> None:
        # The thread of each connection shakes hands: a client that does not would stop the server, and `close` waits.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._server.handle_error = lambda *_: None  # a client that trusts nobody hangs up in the handshake
        self.url = f"https://localhost:{self._server.server_port}"

    def path(self, release: Release, name: str) -> str:
        return f"/{release.repository}/releases/download/v{release.version}/{release.fill(name, os.uname().machine)}"

    def asset(self, tool: Tool) -> str:
        return self.path(release_of(tool), release_of(tool).asset)

    def sums(self, tool: Tool) -> str:
        return self.path(release_of(tool), release_of(tool).digests_file)

    def publish(self, release: Release, version: str = "") -> None:
        program = script(words(release, version or release.version))
        members = {source.member: program for source in release.tools.values() if source.member}
        asset = self.path(release, release.asset)
        self.files[asset] = _archive(members) if members else program
        digest = hashlib.sha256(self.files[asset]).hexdigest()
        name = asset.rpartition("/")[2]
        statement = {
            "_type": "https://in-toto.io/Statement/v0.1",
            "subject": [{"name": name, "digest": {"sha256": digest}}],
        }
        listing = (
            json.dumps(statement)
            if release.digests_file.endswith(".json")
            else f"{'0' * 64}  other\n{digest} *{name}\n"
        )
        self.files[self.path(release, release.digests_file)] = listing.encode()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        releases = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                releases.asked.append(self.path)
                if target := releases.redirects.get(self.path):
                    self.send_response(302)
                    self.send_header("Location", target)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = releases.files.get(self.path)
                self.send_response(200 if body is not None else 404)
                body = body or b""
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in releases.cut else body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


@pytest.fixture
def releases() -> Iterator[Releases]:
    server = Releases()
    yield server
    server.close()


@pytest.fixture
def no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Go, so that a download that fails has nothing to fall back on."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.fixture
def put(tmp_path: Path):
    """Puts a program that says some words into a directory and returns that directory."""

    def _put(name: str, output: str, directory: str = "path") -> Path:
        path = tmp_path / directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(script(output))
        path.chmod(0o755)
        return path.parent

    return _put
