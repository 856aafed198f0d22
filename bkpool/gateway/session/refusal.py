"""Why a client is turned away: a gRPC code that it does not wait on, and a sentence that it can act on.

buildx shows every code at once but UNAVAILABLE, which it polls on for 20 s (DESIGN 3); so that one has one use only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from bkpool.core.errors import BkpoolError, Forbidden, Gone, NoCapacity, Unauthenticated
from bkpool.core.names import Key


class Grpc(IntEnum):
    """The codes in use (https://grpc.io/docs/guides/status-codes/)."""

    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told instead of being connected."""

    code: Grpc
    status: str
    """Its name in the metrics and the log."""
    sentence: str

    @classmethod
    def of(cls, error: BkpoolError) -> Self:
        """The refusal for an error; a worker or a store in trouble are preconditions that failed."""
        match error:
            case Unauthenticated() | Gone():
                code = Grpc.UNAUTHENTICATED
            case Forbidden():
                code = Grpc.PERMISSION_DENIED
            case NoCapacity():
                code = Grpc.RESOURCE_EXHAUSTED
            case _:
                code = Grpc.FAILED_PRECONDITION
        return cls(code, error.code, f"{error.message}. {error.hint}".strip())


def strange(worker: Key) -> Refusal:
    """At the worker's address is something else, which is told nothing and whose answers nobody gets."""
    return Refusal(
        Grpc.FAILED_PRECONDITION,
        "WrongWorker",
        f"what answers at the address of worker {worker} is not that worker, so nothing was sent to it. "
        "Try again in a moment; if it stays so, release the lease and allocate another.",
    )


def waited_first(worker: Key, cause: str) -> Refusal:
    """The client's patience is at its end, or it is not held at all; it will come again by itself."""
    return Refusal(Grpc.UNAVAILABLE, "Waited", f"worker {worker} is on its way: {cause}. Try again in a moment.")


def waited_again(worker: Key, cause: str) -> Refusal:
    """The same lease has waited before: the user should know by now."""
    return Refusal(
        Grpc.FAILED_PRECONDITION,
        "WaitedAgain",
        f"worker {worker} did not come up in time: {cause}. `bkpool logs {worker.name}` says more.",
    )
