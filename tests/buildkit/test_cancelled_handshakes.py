"""Whoever waits for a worker may give up at any moment, on a slow machine too: nothing of that reaches the log."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest
import uvloop

from bkpool.buildkit import connect
from bkpool.buildkit.readiness import ask_over_tls
from bkpool.core.errors import Unavailable
from support.stub_control import server_context, tls

pytestmark = pytest.mark.slow

_TURNS = 6
"""Of the event loop. In fewer, the connection is there and its handshake has begun."""


class SilentServer:
    """Shakes hands, and never answers. Its threads are not those of the loop that asks."""

    def __init__(self, context):
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        self._kept = []

    def serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with suppress(OSError):
                self._kept.append(self._context.wrap_socket(connection, server_side=True))

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._kept:
            connection.close()


async def ask(port):
    await ask_over_tls("the worker", "127.0.0.1", port, tls())


async def call(port):
    async with connect(f"tcp://127.0.0.1:{port}", tls=tls()) as client:
        await client.list_workers()


@pytest.mark.parametrize("probe", [ask, call])
def test_a_probe_that_is_given_up_leaves_no_trace_in_the_log(tmp_path, probe):
    context = server_context(tmp_path)
    context.set_alpn_protocols(["h2"])
    server = SilentServer(context)
    threads = [threading.Thread(target=server.serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    faults = []

    async def give_up_after_each_turn():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: faults.append(context))
        with ExitStack() as stack:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            stack.callback(os.close, writer)
            os.write(writer, b"x")
            # In each turn something else takes so long that the worker has answered before the next one.
            loop.add_reader(reader, lambda: loop.call_soon(loop.call_soon, loop.call_soon, time.sleep, 0.006))
            stack.callback(loop.remove_reader, reader)
            for turns in [*range(1, _TURNS)] * 15:
                task = asyncio.create_task(probe(server.port))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError, Unavailable):
                    await task
                for _ in range(5):
                    await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(give_up_after_each_turn())
    finally:
        server.close()
        for thread in threads:
            thread.join(10)
    assert faults == []
