"""What passes between two peers, without their sockets: TLS, back-pressure and the end of each direction.

Bytes in, bytes out: whoever holds the sockets feeds what they received and sends what is unsent. Nothing here knows
a clock, an event loop, or what the bytes mean.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import cast

_RECORD = 16 * 1024  # plaintext in one TLS record at most (RFC 8446 section 5.1)
_SEAL = 22  # bytes that TLS 1.3 adds to a record: header, type and tag (RFC 8446 section 5.2)

CHUNK = 3 * _RECORD
"""Bytes of plaintext that are read at once to be encrypted. TCP hands on at most 64 KiB in one piece, and what four
records are beyond that, some hundred bytes, in a piece of its own, for which the peer is woken: with one stream this
cost half as much again (docs/benchmarks.md). Three fit into one piece."""

RESEALED = 7 * (_RECORD + _SEAL)
"""Bytes of ciphertext that are read at once to be encrypted anew: whole records, if the peer sends full ones, as it
does in bulk. Sealed again they fill nearly two pieces of TCP."""

_OPENED = 3 * (_RECORD + _SEAL)
"""Bytes of ciphertext that TLS is given at once. A MemoryBIO keeps the size that it once grew to, so with more every
connection that was ever busy would keep more; and it fits the processor's caches."""

AT_ONCE = 5 * _OPENED
"""Bytes taken from a socket at once, at most."""

_PROTOCOL_ROOM = 2 * CHUNK  # what may lie unsent for a peer before nothing more is read from it
_NOTHING = memoryview(b"")
_WORTH = 24  # bytes of ciphertext that one of plaintext may take: a record of one byte has 23 (RFC 8446 section 5.2)
_BARREN = 2 * _RECORD  # bytes of ciphertext without plaintext: the beginning of a record, and some KeyUpdates


class BarrenError(ssl.SSLError):
    """A peer keeps TLS busy and says nothing: to take a KeyUpdate costs twenty microseconds, to send one 27 bytes."""

    reason = "records without data"


class LoopBuffers:
    """Memory that all connections of one event loop share. What is in it is valid within one callback only."""

    __slots__ = ("plain", "received")

    def __init__(self) -> None:
        self.received = memoryview(bytearray(AT_ONCE))
        # What is taken at once, and the record that was begun before.
        self.plain = memoryview(bytearray(AT_ONCE + 2 * _RECORD))


class SniSSLObject(ssl.SSLObject):
    """A server's side that remembers what its client asked for."""

    asked_for: str | None = None
    """The name in the client's SNI (RFC 6066 section 3)."""


class TlsStream:
    """TLS of one peer over two memory buffers.

    After every call, also one that failed, what `take` returns must be sent, or alerts are lost.
    """

    __slots__ = ("_barren", "_incoming", "_object", "_outgoing")

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool = True, server_hostname: str | None = None
    ) -> None:
        self._barren = 0
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )

    def handshake(self, data: memoryview) -> bool:
        """Goes on with the handshake; True when it is complete. Raises ssl.SSLError."""
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def peer_certificate(self) -> bytes | None:
        """The peer's leaf certificate in DER, if it gave one."""
        return self._object.getpeercert(binary_form=True)

    @property
    def asked_for(self) -> str | None:
        """The server name that the client asked for, where the context has its clients' names remembered."""
        return self._object.asked_for if isinstance(self._object, SniSSLObject) else None

    def decrypt(self, data: memoryview, into: memoryview) -> tuple[int, bool]:
        """Decrypts every complete record.

        Args:
            data: Ciphertext, at most AT_ONCE bytes; none asks for what is there already.
            into: Where the plaintext goes, as large as Scratch.plain.

        Returns:
            The length of the plaintext, and whether the peer has said that it ends here.

        Raises:
            ssl.SSLError: It is not what TLS allows.
        """
        length, ended = self._read(data[:_OPENED], into)
        self._justify(min(len(data), _OPENED), length)
        for at in range(_OPENED, len(data), _OPENED):
            if ended:
                break
            more, ended = self._read(data[at : at + _OPENED], into[length:])
            length += more
            self._justify(min(len(data) - at, _OPENED), more)
        return length, ended

    def _justify(self, ciphertext: int, plaintext: int) -> None:
        self._barren = max(0, self._barren + ciphertext - _WORTH * plaintext)
        if self._barren > _BARREN:
            raise BarrenError

    def _read(self, data: memoryview, into: memoryview) -> tuple[int, bool]:
        incoming = self._incoming
        incoming.write(data)
        read = self._object.read
        length = 0
        try:
            while count := cast("int", read(_RECORD, into[length:])):  # with a buffer, read returns a count
                length += count
                if not incoming.pending:  # OpenSSL has it all; asking once more would cost an exception a chunk
                    return length, False
        except ssl.SSLWantReadError:
            return length, False
        except ssl.SSLZeroReturnError:  # instead of a count of 0, once our own end is said
            pass
        return length, True

    def encrypt(self, data: memoryview) -> None:
        """Encrypts all of the data."""
        sent = self._object.write(data)
        while sent < len(data):
            sent += self._object.write(data[sent:])

    def end(self) -> None:
        """Says close_notify. To be called once; what the peer still sends can be read afterwards."""
        if self._incoming.pending:  # unwrap() would take these bytes for a fault, and reading would be over
            return
        with contextlib.suppress(ssl.SSLError):  # WANT_READ: the peer has not ended yet
            self._object.unwrap()

    def take(self) -> bytes:
        """Ciphertext to be sent now."""
        return self._outgoing.read()


class PeerStream:
    """One peer: what it said, and what it still has to be sent."""

    __slots__ = ("deaf", "heard", "heard_end", "said", "said_end", "tls", "unsent")

    def __init__(self, tls: TlsStream | None = None) -> None:
        self.tls = tls
        self.heard = 0
        """Bytes of plaintext from this peer."""
        self.said = 0
        """Bytes of plaintext for this peer."""
        self.heard_end = False
        """The peer sends nothing more."""
        self.said_end = False
        """The peer is sent nothing more, once `unsent` is gone."""
        self.deaf = False
        """The peer takes nothing more; it may still send."""
        self.unsent = _NOTHING
        """For the peer's socket. May lie in a Scratch until `sent` is called."""

    def decode(self, data: memoryview, plain: memoryview) -> memoryview:
        """The plaintext in what the peer's socket gave. Raises ssl.SSLError; an alert is then unsent."""
        if self.tls is None:
            self.heard += len(data)
            return data
        try:
            length, self.heard_end = self.tls.decrypt(data, plain)
        finally:
            self.queue(self.tls.take())
        self.heard += length
        return plain[:length]

    def encode(self, data: memoryview) -> None:
        """Says this to the peer."""
        self.said += len(data)
        if self.tls is None:
            self.queue(data)
        else:
            self.tls.encrypt(data)
            self.queue(self.tls.take())

    def finish(self) -> None:
        """Says to the peer that nothing more will come."""
        if self.said_end:
            return
        self.said_end = True
        if self.tls is not None:
            self.tls.end()
            self.queue(self.tls.take())

    def queue(self, data: bytes | memoryview) -> None:
        """Adds raw bytes for the peer's socket."""
        if self.deaf or not data:
            return
        self.unsent = memoryview(b"".join((self.unsent, data))) if self.unsent else memoryview(data)

    def sent(self, count: int) -> None:
        """The socket took so many of the unsent bytes; the rest is kept."""
        rest = self.unsent[count:]
        # Only bytes are ours to keep; anything else is a view of a Scratch, which the next callback overwrites.
        self.unsent = rest if isinstance(rest.obj, bytes) else memoryview(bytes(rest))

    def deafen(self) -> None:
        """The socket takes nothing more."""
        self.deaf = True
        self.unsent = _NOTHING


class DuplexRelay:
    """Two peers that talk to each other, and the rules of it.

    Nothing is read from one while the other has not taken what there is (back-pressure). The end of one is told to
    the other after all that was said before it, and does not end the other direction (half-close).
    """

    __slots__ = ("_a", "_b", "_plain")

    def __init__(self, a: PeerStream, b: PeerStream, plain: memoryview) -> None:
        self._a = a
        self._b = b
        self._plain = plain

    def received(self, end: PeerStream, data: memoryview) -> None:
        """This peer's socket gave data; none means that it ends. Raises ssl.SSLError."""
        other = self._other(end)
        if data:
            plain = end.decode(data, self._plain)
            if plain:
                other.encode(plain)
        else:
            end.heard_end = True
        if end.heard_end:
            other.finish()

    def may_read(self, end: PeerStream) -> bool:
        """Whether this peer should be read from now."""
        other = self._other(end)
        # The last: a peer that provokes answers of TLS itself (KeyUpdate) but takes none.
        return not (end.heard_end or other.deaf or other.unsent) and len(end.unsent) <= _PROTOCOL_ROOM

    @property
    def half_open(self) -> bool:
        """One direction has ended."""
        return self._ended(self._a) or self._ended(self._b)

    @property
    def over(self) -> bool:
        """Both directions have ended and everything is sent."""
        return self._ended(self._a) and self._ended(self._b) and not self._a.unsent and not self._b.unsent

    def _ended(self, end: PeerStream) -> bool:
        return end.heard_end or self._other(end).deaf

    def _other(self, end: PeerStream) -> PeerStream:
        return self._b if end is self._a else self._a
