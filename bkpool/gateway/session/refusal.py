"""Why a client is refused: a gRPC code on which it does not wait, and a sentence on which the user can act.

buildx shows every code at once except UNAVAILABLE, after which it polls for 20 s (docs/clients.md#refusals). So
UNAVAILABLE is only used where the client should try again by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from bkpool.core.errors import BkpoolError, Forbidden, Gone, NoCapacity, Unauthenticated
from bkpool.core.names import Key


class GrpcCode(IntEnum):
    """The gRPC codes in use (https://grpc.io/docs/guides/status-codes/)."""

    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a client that is not connected to its worker."""

    code: GrpcCode
    status: str
    """The name of the reason in metrics and logs."""
    sentence: str
    """Shown to the user: what is wrong, and what to do."""

    @classmethod
    def of(cls, error: BkpoolError) -> Self:
        """Returns the refusal for an error. A failed worker or store is a failed precondition."""
        match error:
            case Unauthenticated() | Gone():
                code = GrpcCode.UNAUTHENTICATED
            case Forbidden():
                code = GrpcCode.PERMISSION_DENIED
            case NoCapacity():
                code = GrpcCode.RESOURCE_EXHAUSTED
            case _:
                code = GrpcCode.FAILED_PRECONDITION
        return cls(code, error.code, f"{error.message}. {error.hint}".strip())


def wrong_worker(worker: Key) -> Refusal:
    """Another peer than the worker answers at the worker's address. It gets no byte of the client."""
    return Refusal(
        GrpcCode.FAILED_PRECONDITION,
        "WrongWorker",
        f"another server than worker {worker} answers at the worker's address, so nothing was sent to it. "
        "Try again in a moment. If this error stays, release the lease and run `bkpool allocate` again.",
    )


def worker_not_ready(worker: Key, cause: str) -> Refusal:
    """The worker is not reachable yet. The client tries again by itself."""
    return Refusal(
        GrpcCode.UNAVAILABLE, "Waited", f"worker {worker} is not ready yet: {cause}. Try again in a moment."
    )


def gateway_exhausted(worker: Key, cause: str, *, again: bool) -> Refusal:
    """This gateway could not open a connection to the worker. The worker is not the cause.

    Args:
        worker: The worker.
        cause: The system's text.
        again: Whether an earlier client of the lease waited in vain. Else the client tries again by itself.
    """
    return Refusal(
        GrpcCode.RESOURCE_EXHAUSTED if again else GrpcCode.UNAVAILABLE,
        "NoCapacity",
        f"the gateway has no resources left to connect to worker {worker}: {cause}. "
        "Try again when other builds have ended. The gateway's operator should raise its limit of open files.",
    )


def wait_failed_again(worker: Key, cause: str) -> Refusal:
    """A later client of the lease also waited until its time was over, so the refusal shows the cause to the user."""
    return Refusal(
        GrpcCode.FAILED_PRECONDITION,
        "WaitedAgain",
        f"worker {worker} did not become ready in time: {cause}. `bkpool logs {worker.name}` shows the reason.",
    )
