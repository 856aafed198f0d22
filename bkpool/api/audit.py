"""The audit trail: one log line for each decision, with who asked for what, what was decided, and why.

Reasons come from decisions and from errors, which contain no secret. A credential never reaches this module.
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
"""Statuses of errors that deny a request about which nothing was decided before."""


class AuditTrail:
    """What is known so far about one request.

    Args:
        action: What is asked for; empty if the route decides nothing.
        remote: The address that the request comes from.
    """

    def __init__(self, action: str, remote: str | None) -> None:
        self._action = action
        self._facts: dict[str, str] = {"remote": remote or ""}
        self._job: dict[str, str] = {}
        """Claims of the token that say which job asks."""
        self._allowed: bool | None = None
        self._reason = ""

    def add_identity(self, identity: Identity | None) -> None:
        """Adds who asks, or who is asked about."""
        if identity is not None:
            self.add_facts(identity=identity.name, authority=identity.authority, source=identity.source)
            self._job = dict(identity.job)

    def add_facts(self, **facts: str) -> None:
        """Adds what the request is about: pool, worker, allocation."""
        self._facts |= facts

    def set_decision(self, *, allowed: bool, reason: str) -> None:
        """Records what was decided. An allowed request may still fail; then the line names the failure."""
        self._allowed, self._reason = allowed, reason

    def write(self, error: BaseException | None = None) -> None:
        """Writes the log line if something was decided."""
        if isinstance(error, BkpoolError) and self._denies(error):
            self.set_decision(allowed=False, reason=error.message)
        elif error is not None:
            self.add_facts(failure=error.code if isinstance(error, BkpoolError) else type(error).__name__)
        if self._action and self._allowed is not None:
            decision = "allowed" if self._allowed else "denied"
            log.info(
                "audit.decision",
                action=self._action,
                decision=decision,
                reason=self._reason,
                **self._job,
                **self._facts,
            )

    def _denies(self, error: BkpoolError) -> bool:
        limited = error.status is HTTPStatus.TOO_MANY_REQUESTS
        return limited or (self._allowed is None and error.status in _DENIALS)


@contextmanager
def audited(action: str, remote: str | None) -> Iterator[AuditTrail]:
    """The trail of one request. It is written when the request ends: answered, failed, or cancelled by its caller."""
    trail = AuditTrail(action, remote)
    try:
        yield trail
    except BaseException as error:
        trail.write(error)
        raise
    trail.write()
