"""A real gateway with a worker that echoes, in a separate process that counts itself on request.

usage: stub_world.py DIRECTORY; then one JSON command a line on stdin, answered by one line on stdout:
{"do": "lease", "name": N, "open": bool, "over": bool}, {"do": "forget", "name": N}, {"do": "count"}. Ends with stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import structlog
from prometheus_client import generate_latest
from soak.census import census

from bkpool.core.worker import EndReason
from bkpool.gateway.control.server import new_loop
from support.certificates import CertificateFactory
from support.gateway_world import GatewayWorld

HANDSHAKE = 2.0
"""Seconds for a handshake, instead of 10. Many handshakes here never end, and the soak waits for the last of them."""


async def main(directory: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    world = GatewayWorld(CertificateFactory(directory), directory)
    await world.start(new_loop, handshake_timeout=HANDSHAKE, refusal_timeout=HANDSHAKE)
    server = world.server  # of the stub worker. Its writers do not belong to the gateway, so they must not be kept
    print(json.dumps({"port": world.port, "ca": str(world.ca.file)}), flush=True)
    stdin = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    while line := await stdin.readline():
        print(json.dumps(_do(world, json.loads(line))), flush=True)
        if not json.loads(line).get("keep"):
            world.worker_writers[:] = [writer for writer in world.worker_writers if not writer.is_closing()]
    server.close()
    await world.stop()


def _do(world: GatewayWorld, command: dict[str, Any]) -> dict[str, Any]:
    match command["do"]:
        case "lease":
            token = world.lease(
                command["name"], **({} if command["open"] else {"endpoint": None, "wait_reason": "it is"})
            )
            if command["over"]:
                world.end_lease(command["name"], EndReason.RELEASED)
            cert, key = world.certificate(token).files
            return {"cert": cert, "key": key}
        case "forget":
            world.forget_lease(command["name"])
            return {}
        case _:
            world.registry.calls.clear()
            world.registry.connections.clear()
            world.registry.lookups.clear()
            return {
                **census(),
                "series": len(
                    [line for line in generate_latest(world.metrics.registry).splitlines() if line[:1] != b"#"]
                ),
                "active connections": world.metric("active_connections"),
                "faults in the loop": len(world.loop_errors),
            }


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
