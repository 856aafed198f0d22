"""The server's side of an HTTP/2 connection that answers every call with one gRPC status, and then ends.

Bytes go in and bytes come out. It is not a gRPC server: it reads no message and sends no body, only trailers.
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
        self.finished = False
        """Whether the answer is complete. Later bytes of the client are not needed any more."""

    def receive(self, data: bytes) -> bytes:
        """Takes bytes of the client and returns the bytes to send to it."""
        try:
            for event in self._http.receive_data(data):
                if isinstance(event, RequestReceived):
                    self._http.send_headers(event.stream_id, self._headers, end_stream=True)
                    self.finished = True
                elif isinstance(event, ConnectionTerminated):
                    self.finished = True
        except ProtocolError:  # it is not HTTP/2; h2 has queued a GOAWAY
            self.finished = True
            return self._http.data_to_send()
        return self.goaway() if self.finished else self._http.data_to_send()

    def goaway(self) -> bytes:
        """Ends the connection. Returns all unsent bytes with GOAWAY at their end."""
        self.finished = True
        with suppress(ProtocolError):  # the client has sent GOAWAY first
            self._http.close_connection()
        return self._http.data_to_send()
