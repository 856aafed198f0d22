"""The TLS settings that every TLS server of bkpool starts from: no stranger may make it compute for long.

Before version 3.15, Python's ssl cannot say which groups for key exchange a server uses, and OpenSSL's default list
has ffdhe8192. So the ClientHello is read before OpenSSL gets it, and refused if OpenSSL could choose a group that is
not allowed. Nothing else of it is judged here: a large one may be a good one.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
from typing import Final

from bkpool.ports.client_hello import HelloReader, OfferedGroups, offered_groups

ALLOWED_GROUPS: Final = frozenset({0x001D, 0x0017, 0x0018, 0x11EC})
"""X25519, P-256, P-384 and X25519MLKEM768, by their numbers (IANA's registry of TLS Supported Groups)."""

_HANDSHAKE_FAILURE, _DECODE_ERROR = 40, 50  # RFC 8446 section 6.2


class RefusedHelloError(ssl.SSLError):
    """A client's ClientHello is not given to OpenSSL. The alert that says so is among the bytes to send."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ServerTlsObject(ssl.SSLObject):
    """The server's side of one connection, which reads the ClientHello first."""

    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _hello: HelloReader | None = None

    def watch(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        """Reads the ClientHello in these buffers of the connection. Called once, before the handshake."""
        self._incoming, self._outgoing, self._hello = incoming, outgoing, HelloReader()

    def do_handshake(self) -> None:
        """See ssl.SSLObject. Raises RefusedHelloError."""
        if self._hello is not None and self._incoming.pending:
            self._read_hello(self._hello)
        super().do_handshake()

    def _read_hello(self, reader: HelloReader) -> None:
        data = self._incoming.read()  # OpenSSL has taken all that was there before
        try:
            hello = reader.feed(data)
            groups = None if hello is None else offered_groups(hello)
        except ValueError as error:
            self._refuse(_DECODE_ERROR, f"the ClientHello is malformed: {error}")
            return
        if groups is not None and not _acceptable(groups):
            self._refuse(_HANDSHAKE_FAILURE, "the client offers groups for key exchange that are not allowed")
        if reader.done:
            self._hello = None
        self._incoming.write(data)

    def _refuse(self, alert: int, reason: str) -> None:
        self._outgoing.write(bytes((21, 3, 3, 0, 2, 2, alert)))
        raise RefusedHelloError(reason)


class _ServerContext(ssl.SSLContext):
    """Settings whose connections are `ServerTlsObject`s, whoever makes them: the gateway, asyncio or uvloop."""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        assert isinstance(made, ServerTlsObject)  # noqa: S101 - sslobject_class is one, or made from it
        made.watch(incoming, outgoing)
        return made


def new_server_context(minimum_version: ssl.TLSVersion) -> ssl.SSLContext:
    """Settings for a server, without a certificate yet.

    Args:
        minimum_version: The oldest version of TLS that it accepts.

    Returns:
        Settings whose `sslobject_class` may be replaced by one that is made from `ServerTlsObject`.
    """
    context = _ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum_version
    context.sslobject_class = ServerTlsObject
    return context


def _acceptable(groups: OfferedGroups) -> bool:
    """Whether OpenSSL chooses an allowed group, or none.

    A share of a group that this OpenSSL does not know is harmless, and clients send such: a draft, or a number that
    means nothing (RFC 8701). Without a share that it takes, it asks the client for one: of the first group in its own
    list that the client supports too. The slow groups are the last ones there, so a client that supports an allowed
    one is not asked for a slow one.
    """
    if not groups.supported:
        return True  # OpenSSL then uses no share (RFC 8446 section 9.2)
    return _not_allowed().isdisjoint(groups.shared) and not ALLOWED_GROUPS.isdisjoint(groups.supported)


@functools.cache
def _not_allowed() -> frozenset[int]:
    """The groups that this OpenSSL uses and that are not allowed. As a client it offers those that it uses."""
    outgoing = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = HelloReader().feed(outgoing.read())
    return frozenset(offered_groups(hello or b"").supported) - ALLOWED_GROUPS
