"""The client's side of TLS as bytes in and bytes out, and the sessions that make most handshakes short.

A worker is asked every few seconds for as long as it lives, and most of such a question was the proof of who it is. A
session stands for a proof of before, for a bounded time. Nothing here opens a connection or decides who is trusted.
"""

from __future__ import annotations

import ssl
from typing import NamedTuple

_LONGEST = 600.0
"""Seconds after a whole handshake until there must be another one: its certificates are then verified again."""
_MOST = 2048
"""Sessions that are kept; one has about 18 KB, mostly the certificates."""
_AT_ONCE = 64 * 1024  # bytes that are read in one step


class _Kept(NamedTuple):
    context: ssl.SSLContext
    session: ssl.SSLSession
    until: float


class TlsSessions:
    """The sessions of workers whose certificate was verified and checked, by the worker's uid.

    A session is only good for the context that it was made with: with another certificate or CA, all is proven anew.
    The worker must have the key of that session, which is in the memory of the process that was verified.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def get(self, worker_uid: str, context: ssl.SSLContext, now: float) -> ssl.SSLSession | None:
        """The session to begin with; None: the handshake must be a whole one.

        Args:
            worker_uid: The worker.
            context: With what it is connected to.
            now: Monotonic time.
        """
        kept = self._kept.get(worker_uid)
        if kept is None or kept.context is not context or now >= kept.until:
            return None
        return kept.session

    def put(self, worker_uid: str, context: ssl.SSLContext, session: ssl.SSLSession | None, now: float) -> None:
        """Keeps the session of a whole handshake, after the certificate was found to be the worker's."""
        self._kept.pop(worker_uid, None)
        if session is None or not session.has_ticket:
            return
        self._kept[worker_uid] = _Kept(context, session, now + _LONGEST)
        if len(self._kept) > _MOST:
            del self._kept[next(iter(self._kept))]

    def drop(self, worker_uid: str) -> None:
        """Forgets the session of a worker that did not answer: the next handshake is a whole one."""
        self._kept.pop(worker_uid, None)


class TlsClient:
    """One connection.

    Args:
        context: How to connect.
        session: See `TlsSessions.get`.
    """

    def __init__(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, session=session)
        self.is_ready = False
        """Whether the handshake is done."""

    def begin(self) -> bytes:
        """The first bytes to send."""
        self._shake_hands()
        return self._outgoing.read()

    def receive(self, data: bytes) -> bytes:
        """Takes bytes of the server. Returns what they say; `to_send` may have an answer.

        Raises:
            ssl.SSLError: They are no TLS, or the server is not trusted, or it does not trust this side.
        """
        self._incoming.write(data)
        if not self.is_ready:
            self._shake_hands()
        return self._read() if self.is_ready else b""

    def send(self, data: bytes) -> bytes:
        """The bytes that say this to the server."""
        self._tls.write(data)
        return self._outgoing.read()

    def to_send(self) -> bytes:
        """What TLS itself has to say."""
        return self._outgoing.read()

    @property
    def is_resumed(self) -> bool:
        """Whether a session has stood for the proof of who the server is."""
        return bool(self._tls.session_reused)

    @property
    def session(self) -> ssl.SSLSession | None:
        """The session, once the server has said something: it sends its ticket first."""
        return self._tls.session

    @property
    def peer_certificate(self) -> bytes | None:
        """What the server has presented."""
        return self._tls.getpeercert(binary_form=True)

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        self.is_ready = True

    def _read(self) -> bytes:
        parts = []
        try:
            while part := self._tls.read(_AT_ONCE):
                parts.append(part)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return b"".join(parts)
