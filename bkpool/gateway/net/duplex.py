"""The rules of a relay without its sockets: TLS, back-pressure and the end of each direction.

Bytes go in and bytes come out. The owner of the sockets passes in what it received, and sends what is unsent. Nothing
here knows a clock or an event loop, or what the bytes mean.
"""

from __future__ import annotations

from bkpool.gateway.net.buffers import PLAINTEXT_CHUNK
from bkpool.gateway.net.tls_stream import TlsStream

_MAX_UNSENT = 2 * PLAINTEXT_CHUNK
"""Unsent bytes for a peer above which nothing more is read from that peer."""
_EMPTY = memoryview(b"")


class PeerStream:
    """One peer: what it has sent, and what must still be sent to it.

    Args:
        tls: The TLS of this peer after its handshake; None for a peer without TLS.
    """

    __slots__ = ("bytes_in", "bytes_out", "eof_queued", "eof_received", "tls", "unsent", "write_closed")

    def __init__(self, tls: TlsStream | None = None) -> None:
        self.tls = tls
        self.bytes_in = 0
        """Bytes of plaintext that came from this peer."""
        self.bytes_out = 0
        """Bytes of plaintext for this peer."""
        self.eof_received = False
        """The peer sends nothing more."""
        self.eof_queued = False
        """Nothing more is sent to the peer after `unsent`."""
        self.write_closed = False
        """The peer accepts nothing more. It may still send."""
        self.unsent = _EMPTY
        """Bytes for the peer's socket. They may lie in a LoopBuffers until `sent` is called."""

    def decode(self, data: memoryview, plaintext: memoryview) -> memoryview:
        """Returns the plaintext of what the peer's socket gave.

        Args:
            data: What was read from the socket; not empty.
            plaintext: LoopBuffers.plaintext, where TLS writes.

        Raises:
            ssl.SSLError: The peer violated TLS. An alert is then in `unsent`.
        """
        tls = self.tls
        if tls is None:
            self.bytes_in += len(data)
            return data
        try:
            length, self.eof_received = tls.decrypt(data, plaintext)
        finally:
            if tls.outgoing.pending:  # TLS itself answers
                self.queue(tls.take())
        self.bytes_in += length
        return plaintext[:length]

    def encode(self, data: memoryview) -> None:
        """Encrypts this plaintext, if the peer has TLS, and adds it to `unsent`."""
        self.bytes_out += len(data)
        tls = self.tls
        if tls is not None:
            tls.encrypt(data)
            data = memoryview(tls.take())
        if self.unsent or self.write_closed:
            self.queue(data)
        else:
            self.unsent = data

    def write_eof(self) -> None:
        """Adds the end of this direction after the unsent bytes. Does nothing if it was added before."""
        if self.eof_queued:
            return
        self.eof_queued = True
        if self.tls is not None:
            self.tls.close_notify()
            self.queue(self.tls.take())

    def queue(self, data: bytes | memoryview) -> None:
        """Adds bytes for the peer's socket as they are, without encrypting them."""
        if self.write_closed or not data:
            return
        self.unsent = memoryview(b"".join((self.unsent, data))) if self.unsent else memoryview(data)

    def sent(self, count: int) -> None:
        """Removes `count` unsent bytes, which the socket took, and keeps a copy of the rest."""
        if count == len(self.unsent):
            self.unsent = _EMPTY
            return
        rest = self.unsent[count:]
        # Only bytes can be kept. Anything else is a view of a LoopBuffers, which the next callback overwrites.
        self.unsent = rest if isinstance(rest.obj, bytes) else memoryview(bytes(rest))

    def close_write(self) -> None:
        """Drops the unsent bytes: the socket accepts nothing more."""
        self.write_closed = True
        self.unsent = _EMPTY


class DuplexRelay:
    """Two peers whose bytes go to each other.

    Nothing is read from a peer while the other has not accepted what is there already (back-pressure). The end of one
    direction is sent after all bytes of that direction. It does not end the other direction (half-close).

    Args:
        a: One peer.
        b: The other.
        plaintext: LoopBuffers.plaintext of their loop.
    """

    __slots__ = ("_a", "_b", "_plaintext")

    def __init__(self, a: PeerStream, b: PeerStream, plaintext: memoryview) -> None:
        self._a = a
        self._b = b
        self._plaintext = plaintext

    def received(self, peer: PeerStream, data: memoryview) -> None:
        """Passes on what this peer's socket gave; empty data is the end of the stream.

        Raises:
            ssl.SSLError: The peer violated TLS.
        """
        other = self._b if peer is self._a else self._a
        if data:
            plaintext = peer.decode(data, self._plaintext)
            if plaintext:
                other.encode(plaintext)
        else:
            peer.eof_received = True
        if peer.eof_received:
            other.write_eof()

    def may_read(self, peer: PeerStream) -> bool:
        """Returns whether this peer's socket should be read now."""
        other = self._other(peer)
        # The last condition stops a peer that makes TLS itself answer (KeyUpdate) and does not read the answers.
        return not (peer.eof_received or other.write_closed or other.unsent) and len(peer.unsent) <= _MAX_UNSENT

    @property
    def half_open(self) -> bool:
        """At least one direction has ended."""
        return self._ended(self._a) or self._ended(self._b)

    @property
    def finished(self) -> bool:
        """Both directions have ended and everything is sent."""
        return self._ended(self._a) and self._ended(self._b) and not self._a.unsent and not self._b.unsent

    def _ended(self, peer: PeerStream) -> bool:
        return peer.eof_received or self._other(peer).write_closed

    def _other(self, peer: PeerStream) -> PeerStream:
        return self._b if peer is self._a else self._a
