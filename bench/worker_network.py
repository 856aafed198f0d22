"""Measures what a network of its own costs a worker process: its start, a large download, and small connections.

Each figure is taken in turns with a worker in the host's network, in one run. The server is in a network namespace of
its own behind a veth pair, so that the traffic takes the host's routes. It needs root.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.table import spread
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers.processes.runtime import Binaries, ProcessRuntime

MEGABYTES = 200
CONNECTIONS = 1000
_FAR = "bkpool-bench"
_HERE, _THERE, _PORT = "10.213.7.1", "10.213.7.2", 8000
_POOL = Pool(metadata=Metadata(name="default"))

_SERVER = f"""
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        size = {MEGABYTES << 20} if self.path.startswith("/large") else 10
        self.send_response(200); self.send_header("Content-Length", str(size)); self.end_headers()
        block = os.urandom(1 << 20)
        for start in range(0, size, len(block)): self.wfile.write(block[:size - start])
http.server.ThreadingHTTPServer(("{_THERE}", {_PORT}), Handler).serve_forever()
"""
_CLIENT = f"""
import socket
for _ in range({CONNECTIONS}):
    with socket.create_connection(("{_THERE}", {_PORT})) as one:
        one.sendall(b"GET /small HTTP/1.0\\r\\n\\r\\n")
        while one.recv(4096): pass
"""


@contextmanager
def far_server() -> Iterator[None]:
    """A server on another network of this machine."""
    _ip("netns", "add", _FAR)
    try:
        _ip("link", "add", "bkbench0", "type", "veth", "peer", "name", "eth0", "netns", _FAR)
        _ip("address", "add", f"{_HERE}/24", "dev", "bkbench0")
        _ip("link", "set", "bkbench0", "up")
        _ip("-n", _FAR, "address", "add", f"{_THERE}/24", "dev", "eth0")
        _ip("-n", _FAR, "link", "set", "eth0", "up")
        server = subprocess.Popen(["ip", "netns", "exec", _FAR, sys.executable, "-c", _SERVER])
        try:
            yield
        finally:
            server.kill()
            server.wait()
    finally:
        _ip("netns", "delete", _FAR)


def worker_network(tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """The figures, as milliseconds or seconds with their spread, and the ratios of each turn."""
    if os.geteuid() != 0:
        return {"the network of a worker": "not measured: needs root"}
    with far_server(), TemporaryDirectory(prefix="bkpool-bench-") as directory:
        return asyncio.run(_measure(tools, Path(directory), max(runs, 5)))


async def _measure(tools: dict[str, Path], directory: Path, runs: int) -> dict[str, Any]:
    binaries = Binaries(tools["buildkitd"], tools["runc"], tools["rootlesskit"])
    networks = {"host": None, "own": NetworkPrograms.find(os.environ["PATH"])}
    taken: dict[str, dict[str, list[float]]] = {name: {"start": [], "large": [], "small": []} for name in networks}
    for turn in range(runs + 1):
        for name, network in networks.items():
            runtime = ProcessRuntime(directory / name, binaries, network=network)
            figures = await _one_worker(runtime, tools["buildctl"], directory, turn)
            await runtime.purge()
            await runtime.close(stop_workers=True)
            for figure, seconds in figures.items():
                if turn:  # leaves out the first, because disk caches are cold
                    taken[name][figure].append(seconds)
    own, host = taken["own"], taken["host"]
    beyond = [(a - b) * 1000 for a, b in zip(own["start"], host["start"], strict=True)]
    large, small = ([a / b for a, b in zip(own[figure], host[figure], strict=True)] for figure in ("large", "small"))
    return {
        "start of a worker with a network of its own, beyond one without, ms": spread(beyond),
        f"download of {MEGABYTES} MB, own network / host's": spread(large),
        f"{CONNECTIONS} small connections, own network / host's": spread(small),
    }


async def _one_worker(runtime: ProcessRuntime, buildctl: Path, directory: Path, turn: int) -> dict[str, float]:
    slot = Slot("default", "default", 0)
    begin = time.perf_counter()
    endpoint = await runtime.daemons.start(slot, f"uid-{turn}", None, _POOL, _nothing)
    started = time.perf_counter()
    (directory / "Dockerfile").write_text(f"FROM scratch\nADD http://{_THERE}:{_PORT}/large-{turn} /large\n")
    build = [buildctl, f"--addr={endpoint}", "build", "--frontend=dockerfile.v0", f"--local=dockerfile={directory}"]
    await _run(*map(str, build), f"--local=context={directory}")
    loaded = time.perf_counter()
    pid = str(next(iter(_pids(endpoint.removeprefix("unix://")))))
    before = time.perf_counter()
    await _run("nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-S", "-c", _CLIENT)
    return {"start": started - begin, "large": loaded - started, "small": time.perf_counter() - before}


def _pids(socket: str) -> Iterator[int]:
    """The buildkitd that has this socket in its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        command = (entry / "cmdline").read_bytes().split(b"\0")
        if command[0].rpartition(b"/")[2].startswith(b"buildkitd") and f"--addr=unix://{socket}".encode() in command:
            yield int(entry.name)


async def _run(*command: str) -> None:
    quiet = asyncio.subprocess.DEVNULL
    child = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    if await child.wait():
        raise RuntimeError(f"{command[0]} failed")


async def _nothing(_message: str) -> None:
    return


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
