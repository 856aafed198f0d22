"""The Control API of every worker pod of a fake cluster, at the pod's own address.

One stub answers for all of them, each time with the certificate of the pod's Secret. An address is one of this
machine's (127.0.0.0/8), so Linux is needed.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from contextlib import suppress

from grpclib.server import Server

from bkpool.core.names import WORKER_PORT
from bkpool.pki.chain import load_chain
from support.fake_kinds import Doc, Refused, Where
from support.fake_objects import FakeObjects, Stored
from support.stub_control import StubControl

_BACKLOG = 16
_HANDSHAKE = 10.0


class FakeWorkers:
    """What listens in the pods. Give `run` and `ended` to the kubelet.

    Args:
        objects: Has the Secrets.
    """

    def __init__(self, objects: FakeObjects) -> None:
        self._objects = objects
        self._listening: dict[str, socket.socket] = {}
        self._control = StubControl()
        self._server = Server([self._control])
        self._tasks: set[asyncio.Task[None]] = set()
        self._contexts: dict[str, tuple[int, ssl.SSLContext]] = {}
        """The TLS settings of each worker, by the uid of its Secret, with the Secret's version."""
        self.calls = 0
        """How many connections there were."""

    async def run(self, pod: Doc) -> None:
        """Listens at the pod's address."""
        address = pod["status"]["podIP"]
        listener = socket.create_server((address, WORKER_PORT), backlog=_BACKLOG)
        listener.setblocking(False)
        self._listening[pod["metadata"]["uid"]] = listener
        secret = Where("v1", "secrets", pod["metadata"]["namespace"], pod["metadata"]["name"])
        asyncio.get_running_loop().add_reader(listener, self._accept, listener, secret)

    def ended(self, pod: Doc) -> None:
        """Stops listening there."""
        if (listener := self._listening.pop(pod["metadata"]["uid"], None)) is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    async def close(self) -> None:
        """Ends everything."""
        for uid in list(self._listening):
            self.ended({"metadata": {"uid": uid}})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, listener: socket.socket, secret: Where) -> None:
        with suppress(BlockingIOError):
            accepted, _ = listener.accept()
            accepted.setblocking(False)
            self.calls += 1
            task = asyncio.ensure_future(self._serve(accepted, secret))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: socket.socket, secret: Where) -> None:
        self._control.requests.clear()  # nobody reads them, and they would grow
        self._control.transports.clear()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._server._protocol_factory,
                accepted,
                ssl=self._context(self._objects.get(secret)),
                ssl_handshake_timeout=_HANDSHAKE,
            )
        except (OSError, Refused):
            accepted.close()

    def _context(self, secret: Stored) -> ssl.SSLContext:
        uid = secret.doc["metadata"]["uid"]
        version, context = self._contexts.get(uid, (0, None))
        if context is None or version != secret.version:
            context = _context(secret.doc["data"])
            self._contexts[uid] = secret.version, context
        return context


def _context(data: dict[str, str]) -> ssl.SSLContext:
    files = {name: base64.b64decode(content) for name, content in data.items()}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=files["ca.crt"].decode())
    context.set_alpn_protocols(["h2"])
    load_chain(context, files["tls.crt"], files["tls.key"], files["ca.crt"])
    return context
