"""The one call that says whether buildkitd is ready, as bytes in and bytes out, without a socket and without a clock.

Every worker is asked this again and again. With a library for all of gRPC it takes four times the processor time.
It makes no other call, and keeps nothing of the answer but its status and its length.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from hpack import Decoder, Encoder, HPACKError

from bkpool.core.errors import Unavailable, WorkerFailed

NAME = "ListWorkers"
"""The call with which buildx begins, too."""
LONGEST_ANSWER = 2**20
"""Bytes of a message. That of buildkitd has one or two thousand."""

_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE = 2, 4  # settings (RFC 9113 6.5.2)
_FIRST_WINDOW = 65_535  # bytes, before a setting or an update changes it (RFC 9113 6.9.2)
_LONGEST_FRAME = 16_384  # bytes, as long as this side allows no more (RFC 9113 4.2)
_LONGEST_HEADERS = 65_536
_HEAD = struct.Struct(">BHBBI")  # length in 24 bits, type, flags, stream
_MESSAGE_HEAD = struct.Struct(">BI")  # of gRPC over HTTP/2: whether it is compressed, and its length
_STREAM = 1


class _Kind(IntEnum):
    """Frames (RFC 9113 6). Those that are not named here need no answer."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


_OF_THE_CALL = frozenset({_Kind.DATA, _Kind.HEADERS, _Kind.RST_STREAM, _Kind.CONTINUATION})


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _HEAD.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def _request() -> bytes:
    settings = struct.pack(">HIHI", _ENABLE_PUSH, 0, _INITIAL_WINDOW_SIZE, LONGEST_ANSWER)
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/moby.buildkit.v1.Control/{NAME}"),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_Kind.SETTINGS, 0, 0, settings)
        + _frame(_Kind.WINDOW_UPDATE, 0, 0, struct.pack(">I", LONGEST_ANSWER - _FIRST_WINDOW))
        + _frame(_Kind.HEADERS, _END_HEADERS, _STREAM, Encoder().encode(headers))
        + _frame(_Kind.DATA, _END_STREAM, _STREAM, _MESSAGE_HEAD.pack(0, 0))
    )


REQUEST: Final = _request()
"""All that is sent, apart from acknowledgements: the beginning of the connection, and an empty request."""


class ReadyCall:
    """The answer to `REQUEST`.

    Args:
        endpoint: Who is asked, for messages.
    """

    def __init__(self, endpoint: str) -> None:
        self.answered = False
        """Whether buildkitd has answered the call with OK."""
        self._endpoint = endpoint
        self._received = bytearray()
        self._greeted = False
        self._headers: dict[bytes, bytes] = {}
        self._block: bytearray | None = None
        """A list of headers of which a part is missing."""
        self._ends_stream = False
        """Whether the stream ends with that list."""
        self._decoder = Decoder()
        self._message = bytearray()
        """The beginning of the message."""
        self._length = 0

    def receive(self, data: bytes) -> bytes:
        """Takes bytes of the worker, and returns those that it gets back.

        Raises:
            WorkerFailed: It is no buildkitd, or it answers the call with an error.
            Unavailable: It breaks the call off.
        """
        self._received += data
        back = bytearray()
        while not self.answered and len(self._received) >= _HEAD.size:
            high, low, kind, flags, stream = _HEAD.unpack_from(self._received)
            end = _HEAD.size + (high << 16 | low)
            if end > _HEAD.size + _LONGEST_FRAME or not (self._greeted or kind == _Kind.SETTINGS):
                raise self._violation("it sends no HTTP/2 frame")
            if len(self._received) < end:
                break
            payload = bytes(self._received[_HEAD.size : end])
            del self._received[:end]
            back += self._frame_received(kind, flags, stream & 0x7FFF_FFFF, payload)
        return bytes(back)

    def _frame_received(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        if (self._block is not None) != (kind == _Kind.CONTINUATION):
            raise self._violation("a list of headers has no end")
        if kind in _OF_THE_CALL and stream != _STREAM:
            raise self._violation(f"it uses stream {stream}")
        match kind:
            case _Kind.DATA:
                self._data_received(self._unpadded(flags, payload), ends=bool(flags & _END_STREAM))
            case _Kind.HEADERS | _Kind.CONTINUATION:
                self._headers_received(kind, flags, payload)
            case _Kind.RST_STREAM:
                raise Unavailable(f"{self._endpoint} broke off the call {NAME}")
            case _Kind.SETTINGS | _Kind.PING if not flags & _ACK:
                self._greeted = True
                return _frame(kind, _ACK, 0, payload if kind == _Kind.PING else b"")
            case _Kind.PUSH_PROMISE:
                raise self._violation("it makes a call of its own")
            case _Kind.GOAWAY:
                raise Unavailable(f"{self._endpoint} broke off the call {NAME}: it ends the connection")
        return b""

    def _headers_received(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _Kind.HEADERS:
            payload = self._unpadded(flags, payload)
            self._block = bytearray(payload[5:] if flags & _PRIORITY else payload)
            self._ends_stream = bool(flags & _END_STREAM)
        elif self._block is not None:
            self._block += payload
        if self._block is None or len(self._block) > _LONGEST_HEADERS:
            raise self._violation("its headers are too long")
        if not flags & _END_HEADERS:
            return
        try:
            self._headers |= dict(self._decoder.decode(bytes(self._block), raw=True))
        except HPACKError as error:
            raise self._violation(str(error)[:100]) from None
        self._block = None
        if self._ends_stream:
            self._stream_ended()

    def _data_received(self, data: bytes, *, ends: bool) -> None:
        self._length += len(data)
        if self._length > LONGEST_ANSWER:
            raise WorkerFailed(f"{self._endpoint} answered {NAME} with more than {LONGEST_ANSWER} bytes")
        self._message += data[: _MESSAGE_HEAD.size - len(self._message)]
        if ends:
            self._stream_ended()

    def _stream_ended(self) -> None:
        """Judges the answer, as gRPC over HTTP/2 wants it: the status of HTTP, that of the call, and one message."""
        http, kind = self._text(b":status"), self._text(b"content-type")
        if http != "200" or not kind.startswith("application/grpc"):
            raise WorkerFailed(f"{self._endpoint} answered {NAME} with HTTP status {http} and no gRPC")
        status = self._text(b"grpc-status")
        if status != "0":
            raise WorkerFailed(f"buildkitd answered {NAME} with grpc-status {status}")
        if not self._message:
            raise WorkerFailed(f"buildkitd answered {NAME} with OK but without a message")
        if len(self._message) < _MESSAGE_HEAD.size or _MESSAGE_HEAD.unpack(self._message) != (
            0,
            self._length - _MESSAGE_HEAD.size,
        ):
            raise WorkerFailed(f"{self._endpoint} answered {NAME} with something else than BuildKit's API has")
        self.answered = True

    def _text(self, name: bytes) -> str:
        return self._headers.get(name, b"none").decode("ascii", "replace")[:20]

    def _unpadded(self, flags: int, payload: bytes) -> bytes:
        if not flags & _PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise self._violation("a frame has more padding than bytes")
        return payload[1 : len(payload) - payload[0]]

    def _violation(self, what: str) -> WorkerFailed:
        return WorkerFailed(f"what listens on {self._endpoint} does not speak HTTP/2: {what}")
