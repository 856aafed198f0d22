"""The audit trail: who asked for what, what was decided, and why; one line a decision.

Reasons come from decisions and from errors, which hold no secret; a credential never gets here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import structlog

from bkpool.core.errors import BkpoolError
from bkpool.identity import Identity

log = structlog.get_logger(__name__)

_DENIALS = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
"""Statuses of errors that are decisions, where none was made before."""


class Trail:
    """What is known so far of one request.

    Args:
        action: What is asked for; empty: nothing that is decided about.
        remote: The address that the request comes from.
    """

    def __init__(self, action: str, remote: str | None) -> None:
        self._action = action
        self._facts: dict[str, str] = {"remote": remote or ""}
        self._allowed: bool | None = None
        self._reason = ""

    def of(self, identity: Identity | None) -> None:
        """Who asks, or is asked about."""
        if identity is not None:
            self.about(identity=identity.name, authority=identity.authority, source=identity.source)

    def about(self, **facts: str) -> None:
        """What it is about: pool, worker, allocation."""
        self._facts |= facts

    def decided(self, *, allowed: bool, reason: str) -> None:
        """What was decided. An allowed request may still fail, and then the line tells with what."""
        self._allowed, self._reason = allowed, reason

    def write(self, error: BaseException | None = None) -> None:
        """Writes the line, if something was decided."""
        if isinstance(error, BkpoolError) and self._denies(error):
            self.decided(allowed=False, reason=error.message)
        elif error is not None:
            self.about(failure=error.code if isinstance(error, BkpoolError) else type(error).__name__)
        if self._action and self._allowed is not None:
            decision = "allowed" if self._allowed else "denied"
            log.info("audit.decision", action=self._action, decision=decision, reason=self._reason, **self._facts)

    def _denies(self, error: BkpoolError) -> bool:
        limited = error.status is HTTPStatus.TOO_MANY_REQUESTS
        return limited or (self._allowed is None and error.status in _DENIALS)


@contextmanager
def audited(action: str, remote: str | None) -> Iterator[Trail]:
    """The trail of one request, written when it ends: answered, failed, or given up by its caller."""
    trail = Trail(action, remote)
    try:
        yield trail
    except BaseException as error:
        trail.write(error)
        raise
    trail.write()
