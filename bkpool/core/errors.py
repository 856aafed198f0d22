"""The errors of bkpool, one class for each thing somebody branches on.

Each class has an HTTP status and an exit code; each instance a message that says what is wrong and a hint that
says what to do. They never carry a secret and never a traceback to a user.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar


class BkpoolError(Exception):
    """Whatever bkpool tells a user.

    Args:
        message: One sentence: what is wrong, naming the field, file or object.
        hint: One sentence: what to do about it; empty where the message says it already.
        code: A finer name than the class's own, for programs (`PortTaken`); `EXIT` may have an exit code for it, and
            `STATUS` an HTTP status.
        exit_code: An exit code of its own.
        field: The path of the offending field (`spec.scaling.max`), where there is one.
        retry_after: Seconds after which a new try makes sense, where that is known.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    default_exit: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        code: str | None = None,
        exit_code: int | None = None,
        field: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or type(self).__name__
        self.status = STATUS.get(self.code, self.status)
        self.exit_code = EXIT.get(self.code, self.default_exit) if exit_code is None else exit_code
        self.field = field
        self.retry_after = retry_after

    @property
    def message_and_hint(self) -> str:
        """Both in one text, for places that have one field only."""
        return f"{self.message}. {self.hint}" if self.hint else self.message


class InvalidInput(BkpoolError):
    """A value that a user gave is wrong; the message names the field. Exit code 2, as click's usage errors."""

    status = HTTPStatus.BAD_REQUEST
    default_exit = 2


class Unauthenticated(BkpoolError):
    """No credential, or one that nobody here issued."""

    status = HTTPStatus.UNAUTHORIZED
    default_exit = 3


class Forbidden(BkpoolError):
    """A known identity that may not do this."""

    status = HTTPStatus.FORBIDDEN
    default_exit = 4


class NotFound(BkpoolError):
    """No such pool, worker or lease."""

    status = HTTPStatus.NOT_FOUND
    default_exit = 5


class Conflict(BkpoolError):
    """The object exists already, or is no longer what the writer read."""

    status = HTTPStatus.CONFLICT
    default_exit = 6


class Gone(BkpoolError):
    """What was asked for has ended: a lease (released, expired, lost), or the history of a watch."""

    status = HTTPStatus.GONE
    default_exit = 7


class NoCapacity(BkpoolError):
    """No worker came free in the time given, or too many wait already. Exit code 75, sysexits' EX_TEMPFAIL."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    default_exit = 75


class WorkerFailed(BkpoolError):
    """buildkitd did not start, or it died more often than is bearable.

    Args:
        message: As for every error. It never contains text from buildkitd's log.
        log_tail: The last lines of buildkitd's log; empty if there are none. They may tell of somebody's build, so
            they are kept apart from the message: `core.reconcile.failures.failure_message` decides who may read them.
        **details: As for every error.
    """

    status = HTTPStatus.BAD_GATEWAY
    default_exit = 70

    def __init__(self, message: str, *, log_tail: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.log_tail = log_tail


class Unavailable(BkpoolError):
    """The appliance or its store cannot be reached just now. Exit code 69, sysexits' EX_UNAVAILABLE."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    default_exit = 69


class HostFault(BkpoolError):
    """This machine lacks something: a free port, disk, a tool, a permission, a readable key.

    Exit code 71 (sysexits' EX_OSERR), or a finer one from `EXIT` by the error's code.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    default_exit = 71


STATUS = {
    "LimitReached": HTTPStatus.TOO_MANY_REQUESTS,
}
"""HTTP statuses of errors that a client may want to tell apart from their class's."""
EXIT = {
    "PortTaken": 72,
    "DiskFull": 73,
    "AlreadyRunning": 74,
    "Permission": 77,
    "Unreadable": 78,
    "ToolMissing": 79,
}
"""Exit codes of the faults of a host that a script may want to tell apart."""
