"""The server's side of an HTTP/2 connection that answers every call with one gRPC status, and then ends.

Bytes go in and bytes come out. It is not a gRPC server: it reads no header and no message of a call, and sends no
body, only trailers. The clients are strangers, and a frame costs many times more here than it costs them. So they may
send little before a call.
"""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import quote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, RequestReceived
from h2.exceptions import ProtocolError

from bkpool.gateway.session.refusal import Refusal

# grpc-message: printable ASCII except % is not escaped (https://grpc.github.io/grpc/core/md_doc__p_r_o_t_o_c_o_l-_h_t_t_p2.html)
_NOT_ESCAPED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

_PREFACE_LENGTH = 24  # RFC 9113 section 3.4
_HEADER = 9
"""Bytes of a frame's header (RFC 9113 section 4.1)."""
_HEADERS = 1
_ANY_CALL = b"\0\0\6\1\4%b\x83\x86\x84\x41\1x"
"""A HEADERS frame of a POST, with a gap for its stream. It stands for that of the client: to unpack a header block of
250 KB can take half a second, and nothing of it is needed."""
_MOST_FRAMES = 100
"""Frames of a client until it is told to go. grpc-go sends three until its first call."""
_MOST_CALLS = 10
"""Calls that are answered. They came together, before the client could see the first answer."""
_LONGEST_FRAME = 256
"""Bytes of a frame before a call, without its header: 42 settings. Others that are allowed there have at most 8."""


class GrpcAnswer:
    """Answers the first call with a refusal and then sends GOAWAY, so that a client makes no more calls.

    Args:
        refusal: The answer.
    """

    def __init__(self, refusal: Refusal) -> None:
        self._headers = [
            (":status", "200"),
            ("content-type", "application/grpc"),
            ("grpc-status", str(int(refusal.code))),
            ("grpc-message", quote(refusal.sentence, safe=_NOT_ESCAPED)),
        ]
        self._http = H2Connection(H2Configuration(client_side=False))
        self._http.initiate_connection()
        self._unread = bytearray()
        self._preface_left = _PREFACE_LENGTH
        self._frames = self._calls = 0
        self.finished = False
        """Whether the answer is complete. Later bytes of the client are not needed any more."""

    def receive(self, data: bytes) -> bytes:
        """Takes bytes of the client and returns the bytes to send to it."""
        self._unread += data
        try:
            self._read_preface()
            while not self._preface_left and self._read_frame():
                pass
        except ProtocolError:  # it is not HTTP/2; h2 has queued a GOAWAY
            self.finished = True
            return self._http.data_to_send()
        return self.goaway() if self.finished else self._http.data_to_send()

    def _read_preface(self) -> None:
        if self._preface_left and self._unread:
            part = bytes(self._unread[: self._preface_left])
            del self._unread[: len(part)]
            self._preface_left -= len(part)
            self._http.receive_data(part)

    def _read_frame(self) -> bool:
        """Takes one frame; False if there is no whole one, or no more may come."""
        unread = self._unread
        if len(unread) < _HEADER or self._frames >= _MOST_FRAMES or self._calls >= _MOST_CALLS:
            self.finished |= self._frames >= _MOST_FRAMES
            return False
        end = _HEADER + int.from_bytes(unread[:3])
        if unread[3] == _HEADERS:
            self._calls += 1
            self._take(_ANY_CALL % bytes(unread[5:_HEADER]))
        elif not self.finished:  # after a call, only other calls are of interest
            if end > _HEADER + _LONGEST_FRAME:
                self.finished = True
                return False
            if end > len(unread):
                return False
            self._take(bytes(unread[:end]))
        self._frames += 1
        del unread[:end]  # of a call there may be more to come; nothing of it is read after this answer
        return True

    def _take(self, frame: bytes) -> None:
        for event in self._http.receive_data(frame):
            if isinstance(event, RequestReceived):
                self._http.send_headers(event.stream_id, self._headers, end_stream=True)
                self.finished = True
            elif isinstance(event, ConnectionTerminated):
                self.finished = True

    def goaway(self) -> bytes:
        """Ends the connection. Returns all unsent bytes with GOAWAY at their end."""
        self.finished = True
        with suppress(ProtocolError):  # the client has sent GOAWAY first
            self._http.close_connection()
        return self._http.data_to_send()
