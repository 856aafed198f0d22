"""A server to which a build can send its cache as to S3. It stores nothing, and remembers who signed each request."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeS3(ThreadingHTTPServer):
    """Refuses every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.signers: list[str] = []
        """The access key of each request; empty for one that is not signed."""

    @property
    def port(self) -> int:
        return self.server_port

    def cache(self, **more: str) -> str:
        """The attributes of a cache in this server, for buildctl and buildx."""
        known = {"bucket": "b", "region": "r", "use_path_style": "true", "retry_max_attempts": "1", "mode": "max"}
        attributes = {"type": "s3", "endpoint_url": f"http://127.0.0.1:{self.port}", **known, **more}
        return ",".join(f"{name}={value}" for name, value in attributes.items())


class _Handler(BaseHTTPRequestHandler):
    server: FakeS3

    def _refuse(self) -> None:
        signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        self.server.signers.append(signed[1] if signed else "")
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = _refuse  # noqa: N815 - http.server looks for these names

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextmanager
def fake_s3() -> Iterator[FakeS3]:
    """Serves until the end of the block."""
    with FakeS3() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
