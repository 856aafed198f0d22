"""The server's side of an HTTP/2 connection that gives one gRPC status to every call, and then goes away.

Bytes in, bytes out. It is not a gRPC server: it reads no message and answers with trailers only.
"""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import quote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, RequestReceived
from h2.exceptions import ProtocolError

from bkpool.gateway.session.refusal import Refusal

# grpc-message: printable ASCII but % stays as it is (https://grpc.github.io/grpc/core/md_doc__p_r_o_t_o_c_o_l-_h_t_t_p2.html)
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class GrpcAnswer:
    """Says a refusal to whatever is called first, then GOAWAY, so that a client polls nothing on this connection."""

    def __init__(self, refusal: Refusal) -> None:
        self._headers = [
            (":status", "200"),
            ("content-type", "application/grpc"),
            ("grpc-status", str(int(refusal.code))),
            ("grpc-message", quote(refusal.sentence, safe=_PLAIN)),
        ]
        self._http = H2Connection(H2Configuration(client_side=False))
        self._http.initiate_connection()
        self.finished = False
        """Everything has been said; what the client sends is of no interest any more."""

    def receive(self, data: bytes) -> bytes:
        """Takes what the client says, returns what it is to be sent."""
        try:
            for event in self._http.receive_data(data):
                if isinstance(event, RequestReceived):
                    self._http.send_headers(event.stream_id, self._headers, end_stream=True)
                    self.finished = True
                elif isinstance(event, ConnectionTerminated):
                    self.finished = True
        except ProtocolError:  # not HTTP/2; h2 has its GOAWAY ready
            self.finished = True
            return self._http.data_to_send()
        return self.goodbye() if self.finished else self._http.data_to_send()

    def goodbye(self) -> bytes:
        """GOAWAY, behind all that is not sent yet."""
        self.finished = True
        with suppress(ProtocolError):  # the client has said GOAWAY first
            self._http.close_connection()
        return self._http.data_to_send()
