"""Reads which groups for key exchange a TLS client offers, from the first bytes that it sends.

A server must know them before it computes anything with them: a share of ffdhe8192 in 1.2 KB costs it 0.14 s. Nothing
here judges whether a message is a valid handshake: OpenSSL does, after this. Pure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_HANDSHAKE, _ALERT, _CHANGE_CIPHER_SPEC = 22, 21, 20  # content types of records, RFC 8446 section 5.1
_CLIENT_HELLO = 1
_HEADER = 5
"""Bytes of a record's header: its type, a version, and the length of the rest."""
_LONGEST_RECORD = 16 * 1024 + 2048  # what OpenSSL accepts
_LONGEST_HELLO = 8 * 1024
"""Bytes. With two shares of ML-KEM, an encrypted name and a ticket a ClientHello has 6 KB. OpenSSL takes 128 KiB."""
_MOST_RECORDS = 64
"""Records that one ClientHello may come in. Clients use one, and some that hide from a censor a few."""
_MOST_EXTENSIONS = 128
"""Clients send about 20."""
_SUPPORTED_GROUPS, _KEY_SHARE = 10, 51  # extensions, RFC 8446 section 4.2


@dataclass(frozen=True, slots=True)
class OfferedGroups:
    """The groups of a ClientHello, by their numbers (RFC 8446 section 4.2.7), in the client's order."""

    supported: tuple[int, ...]
    """Those that the server may choose."""
    shared: tuple[int, ...]
    """Those of which the client has sent a share, so that the server may compute with it at once."""


class HelloReader:
    """Finds the ClientHello in the first bytes of a connection, however they are cut into records and segments."""

    __slots__ = ("_bytes", "_message", "_records", "done")

    def __init__(self) -> None:
        self._bytes = bytearray()  # of the record that is not complete yet
        self._records = 0
        self._message = bytearray()  # of the handshake message that is not complete yet
        self.done = False
        """The ClientHello was found, or there is none in a form that OpenSSL would accept."""

    def feed(self, data: bytes) -> bytes | None:
        """Takes the next bytes of the client.

        Returns:
            The ClientHello without its header, once; None while it is not complete, and if there is none.

        Raises:
            ValueError: It is too long, or comes in too many records.
        """
        received, at = self._bytes, 0
        received += data
        found = None
        while not self.done and len(received) - at >= _HEADER:
            length = int.from_bytes(received[at + 3 : at + _HEADER])
            if length > _LONGEST_RECORD:
                self.done = True
                break
            end = at + _HEADER + length
            if end > len(received):
                break
            found = self._take_record(received[at], received[at + _HEADER : end])
            at = end
        del received[:at]
        return found

    def _take_record(self, kind: int, content: bytearray) -> bytes | None:
        self._records += 1
        if self._records > _MOST_RECORDS:
            raise ValueError(f"it comes in more than {_MOST_RECORDS} records")
        if kind == _HANDSHAKE:
            self._message += content
            return self._whole_hello()
        self.done = kind not in {_ALERT, _CHANGE_CIPHER_SPEC}  # after these OpenSSL may go on
        return None

    def _whole_hello(self) -> bytes | None:
        message = self._message
        if len(message) < 4:  # noqa: PLR2004 - the header: a type, and three bytes of length
            return None
        length = int.from_bytes(message[1:4])
        self.done = message[0] != _CLIENT_HELLO
        if not self.done and length > _LONGEST_HELLO:
            raise ValueError(f"it has more than {_LONGEST_HELLO} bytes")
        if self.done or len(message) < 4 + length:
            return None
        self.done = True
        return bytes(message[4 : 4 + length])


def offered_groups(hello: bytes) -> OfferedGroups:
    """The groups that a ClientHello offers.

    Args:
        hello: What HelloReader found.

    Raises:
        ValueError: It is malformed.
    """
    rest = _Bytes(hello)
    rest.take(2 + 32)  # version, random
    for size in (1, 2, 1):  # session id, cipher suites, compression methods
        rest.vector(size)
    supported: list[int] = []
    shared: list[int] = []
    extensions = _Bytes(rest.vector(2) if rest.left else b"")
    for _ in range(_MOST_EXTENSIONS):
        if not extensions.left:
            break
        kind, data = extensions.number(), _Bytes(extensions.vector(2))
        if kind == _SUPPORTED_GROUPS:
            groups = data.vector(2)
            supported += struct.unpack(f">{len(groups) // 2}H", groups[: len(groups) & ~1])
        elif kind == _KEY_SHARE:
            shares = _Bytes(data.vector(2))
            while shares.left:
                shared.append(shares.number())
                shares.vector(2)
    else:
        raise ValueError(f"it has {_MOST_EXTENSIONS} extensions or more")
    return OfferedGroups(tuple(supported), tuple(shared))


class _Bytes:
    """Bytes that are read from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ValueError("a field is longer than its message")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self) -> int:
        return int.from_bytes(self.take(2))

    def vector(self, size: int) -> bytes:
        """A field after its length, which has this many bytes."""
        return self.take(int.from_bytes(self.take(size)))
