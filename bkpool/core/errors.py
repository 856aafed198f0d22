"""The errors of bkpool, with one class for each case that callers handle differently.

Each class has an HTTP status and an exit code. Each error has a message that says what is wrong, and a hint that says
what to do. They never contain a secret, and no user sees a traceback.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar


class BkpoolError(Exception):
    """An error that a user can read.

    Args:
        message: One sentence: what is wrong, naming the field, file or object.
        hint: One sentence: what to do about it; empty if the message says it already.
        code: A more specific name than the class, for programs (`PortTaken`). `EXIT` may have an exit code for it,
            and `STATUS` an HTTP status.
        exit_code: Replaces the exit code of the class or the code.
        field: The path of the wrong field (`spec.scaling.max`), if there is one.
        retry_after: Seconds after which it makes sense to try again, if that is known.
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
    """A value from a user is wrong; the message names the field. Exit code 2, as for click's usage errors."""

    status = HTTPStatus.BAD_REQUEST
    default_exit = 2


class Unauthenticated(BkpoolError):
    """There is no credential, or it is not accepted here."""

    status = HTTPStatus.UNAUTHORIZED
    default_exit = 3


class Forbidden(BkpoolError):
    """An authenticated caller who may not do this."""

    status = HTTPStatus.FORBIDDEN
    default_exit = 4


class NotFound(BkpoolError):
    """There is no such pool, worker or lease."""

    status = HTTPStatus.NOT_FOUND
    default_exit = 5


class Conflict(BkpoolError):
    """The object exists already, or it was changed after the writer read it."""

    status = HTTPStatus.CONFLICT
    default_exit = 6


class Gone(BkpoolError):
    """What was asked for has ended: a lease (released, expired, lost), or the history of a watch."""

    status = HTTPStatus.GONE
    default_exit = 7


class NoCapacity(BkpoolError):
    """No worker became free in time, or too many requests wait already. Exit code 75, sysexits' EX_TEMPFAIL."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    default_exit = 75


class WorkerFailed(BkpoolError):
    """buildkitd did not start, or it failed too often in a row.

    Args:
        message: As for every error. It never contains text from buildkitd's log.
        log_tail: The last lines of buildkitd's log; empty if there are none. They may contain output
            of a caller's build, so they are not part of the message: `core.reconcile.failures.failed_worker`
            decides who may read them.
        **details: As for every error.
    """

    status = HTTPStatus.BAD_GATEWAY
    default_exit = 70

    def __init__(self, message: str, *, log_tail: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.log_tail = log_tail


class Unavailable(BkpoolError):
    """The appliance or its store cannot be reached now. Exit code 69, sysexits' EX_UNAVAILABLE."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    default_exit = 69


class HostFault(BkpoolError):
    """This machine lacks something: a free port, disk, a tool, a permission, a readable key.

    Exit code 71 (sysexits' EX_OSERR), or a more specific one from `EXIT` for the error's code.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    default_exit = 71


class DiskFull(HostFault):
    """A file system has no room for what must be written. Reads go on, and writes do as soon as there is room.

    Exit code 73, sysexits' EX_CANTCREAT.
    """

    status = HTTPStatus.INSUFFICIENT_STORAGE
    default_exit = 73


STATUS = {
    "LimitReached": HTTPStatus.TOO_MANY_REQUESTS,
    "RefusedByCluster": HTTPStatus.SERVICE_UNAVAILABLE,
    "Unreadable": HTTPStatus.SERVICE_UNAVAILABLE,
}
"""HTTP statuses of codes that have another status than their class."""
EXIT = {
    "PortTaken": 72,
    "AlreadyRunning": 74,
    "RefusedByCluster": 69,
    "Permission": 77,
    "Unreadable": 78,
    "ToolMissing": 79,
}
"""Exit codes of codes that have another one than their class: scripts may want to distinguish them."""
