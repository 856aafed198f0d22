"""The calls of a worker's Control API, each with a time limit and errors that say what happened in a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from grpclib.client import UnaryStreamMethod, UnaryUnaryMethod
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import ProtocolError

from bkpool.buildkit.connection import ControlConnection, WorkerTls, open_connection
from bkpool.buildkit.records import BuildEvent, BuildkitVersion, UsageRecord, WorkerRecord
from bkpool.buildkit.stubs import control_pb2 as pb
from bkpool.buildkit.stubs.control_grpc import ControlStub
from bkpool.core.errors import BkpoolError, Unavailable, WorkerFailed

_NANOSECONDS = 1_000  # in a microsecond, the unit of timedelta
_QUOTED = 200  # characters of a reason that HTTP/2 gives for the end of a call


@dataclass(frozen=True, slots=True)
class CallTimeouts:
    """Seconds after which a call has failed."""

    connect: float = 10.0
    """To connect and shake hands."""
    answer: float = 20.0
    """For what buildkitd knows at once; buildx gives ListWorkers as long."""
    disk_usage: float = 120.0
    """buildkitd measures the entries whose size it does not know yet."""
    prune: float = 600.0
    """For all of it: files are deleted while it runs."""


_Request = TypeVar("_Request", bound=ProtoMessage)
_Reply = TypeVar("_Reply", bound=ProtoMessage)
_Result = TypeVar("_Result")


@asynccontextmanager
async def connect(
    endpoint: str, *, tls: WorkerTls | None = None, timeouts: CallTimeouts | None = None
) -> AsyncIterator[ControlClient]:
    """Connects to a worker, once, and closes the connection at the end.

    Args:
        endpoint: `unix:///path`, or `tcp://address:port` of a worker with TLS.
        tls: For a `tcp` endpoint: how to reach the worker and how to recognise it.
        timeouts: For connecting and for each call; None: the defaults of `CallTimeouts`.

    Raises:
        Unavailable: Nobody listens there, or the handshake failed or took too long.
        WorkerFailed: Another worker answers (`WrongWorker`).
        ValueError: The endpoint is neither of the two.
    """
    timeouts = timeouts or CallTimeouts()
    async with open_connection(endpoint, tls, timeouts.connect) as connection:
        yield ControlClient(connection, timeouts)


class ControlClient:
    """Calls to one worker. Calls may run at the same time.

    Every call raises `Unavailable` when the connection is lost or the time is up, and `WorkerFailed` when buildkitd
    answers with an error or with something else than gRPC. Neither quotes buildkitd's own text in its message: that
    may be about the owner's build. It is in the error's `__cause__`.
    """

    def __init__(self, connection: ControlConnection, timeouts: CallTimeouts) -> None:
        self._connection = connection
        self._timeouts = timeouts
        self._stub = ControlStub(connection.channel)

    @property
    def peer_pid(self) -> int:
        """The process behind a Unix socket, as this process sees it (SO_PEERCRED of unix(7))."""
        return self._connection.peer_pid

    async def info(self) -> BuildkitVersion:
        """Which buildkitd it is."""
        reply = await self._unary(self._stub.Info, pb.InfoRequest(), self._timeouts.answer)
        return BuildkitVersion.from_message(reply.buildkitVersion)

    async def list_workers(self) -> list[WorkerRecord]:
        """The platforms and labels of buildkitd's own workers: one, for a daemon of bkpool."""
        reply = await self._unary(self._stub.ListWorkers, pb.ListWorkersRequest(), self._timeouts.answer)
        return [WorkerRecord.from_message(record) for record in reply.record]

    async def disk_usage(self, *, filters: Sequence[str] = ()) -> list[UsageRecord]:
        """The entries of the cache.

        Args:
            filters: Of containerd's kind, as `type==regular`; entries that match one of them are returned.
        """
        request = pb.DiskUsageRequest(filter=filters)
        reply = await self._unary(self._stub.DiskUsage, request, self._timeouts.disk_usage)
        with self._errors_of("DiskUsage"):
            return [UsageRecord.from_message(record) for record in reply.record]

    async def prune(
        self,
        *,
        filters: Sequence[str] = (),
        include_internal: bool = False,
        keep_duration: timedelta = timedelta(),
        reserved_space: int = 0,
        max_used_space: int = 0,
        min_free_space: int = 0,
    ) -> AsyncGenerator[UsageRecord, None]:
        """Deletes entries of the cache that are not in use, and yields each. Use it with `contextlib.aclosing`.

        Args:
            filters: As in `disk_usage`.
            include_internal: Also deletes what frontends keep for themselves (`all` in BuildKit's API).
            keep_duration: Entries that were used more recently stay.
            reserved_space: Bytes that always stay.
            max_used_space: Bytes; deletes only down to that many. 0: no such bound.
            min_free_space: Bytes; deletes only until that many are free on the disk. 0: no such bound.
        """
        request = pb.PruneRequest(
            filter=filters,
            all=include_internal,
            keepDuration=keep_duration // timedelta(microseconds=1) * _NANOSECONDS,
            reservedSpace=reserved_space,
            maxUsedSpace=max_used_space,
            minFreeSpace=min_free_space,
        )
        calls = self._stream(self._stub.Prune, request, UsageRecord.from_message, self._timeouts.prune)
        async with aclosing(calls) as records:
            async for record in records:
                yield record

    async def history(
        self,
        *,
        active_only: bool = False,
        ref: str = "",
        early_exit: bool = False,
        filters: Sequence[str] = (),
        limit: int = 0,
    ) -> AsyncGenerator[BuildEvent, None]:
        """Yields what is in the history of builds, then what happens. Use it with `contextlib.aclosing`.

        The call begins when the first event is asked for, and ends when buildkitd shuts down. It has no time limit,
        since there may be no build for hours. A daemon that is killed is noticed at once, a node that vanishes after
        15 s.

        Args:
            active_only: Only builds that run.
            ref: Only the build with this reference; "": all.
            early_exit: Ends after what is in the history already.
            filters: As `status==error`; builds that match one of them are returned.
            limit: At most this many records of the history; 0: all.
        """
        request = pb.BuildHistoryRequest(
            ActiveOnly=active_only, Ref=ref, EarlyExit=early_exit, Filter=filters, Limit=limit
        )
        async with aclosing(
            self._stream(self._stub.ListenBuildHistory, request, BuildEvent.from_message, None)
        ) as events:
            async for event in events:
                yield event

    async def delete_build(self, ref: str) -> None:
        """Deletes a build that has ended from the history, with its log and its trace; also one that is pinned.

        A daemon in which somebody has asked for this very build only hides it, until it is started again (seen with
        0.34.2).
        """
        request = pb.UpdateBuildHistoryRequest(Ref=ref, Delete=True)
        await self._unary(self._stub.UpdateBuildHistory, request, self._timeouts.answer)

    async def _unary(self, method: UnaryUnaryMethod[_Request, _Reply], request: _Request, seconds: float) -> _Reply:
        name = _name(method.name)

        async def call() -> _Reply:
            async with method.open() as stream:
                await stream.send_message(request, end=True)
                reply = await stream.recv_message()
                await stream.recv_trailing_metadata()  # raises GRPCError for any status but OK
            if reply is None:
                raise WorkerFailed(f"buildkitd answered {name} with OK but without a message")
            return reply

        with self._errors_of(name, seconds):
            return await _in_own_task(call(), _deadline(seconds))

    async def _stream(
        self,
        method: UnaryStreamMethod[_Request, _Reply],
        request: _Request,
        convert: Callable[[_Reply], _Result],
        seconds: float | None,
    ) -> AsyncGenerator[_Result, None]:
        deadline = _deadline(seconds)
        with self._errors_of(_name(method.name), seconds):
            async with method.open() as stream:
                await _in_own_task(stream.send_message(request, end=True), deadline)
                while (message := await _in_own_task(stream.recv_message(), deadline)) is not None:
                    yield convert(message)
                await _in_own_task(stream.recv_trailing_metadata(), deadline)

    @contextmanager
    def _errors_of(self, call: str, seconds: float | None = None) -> Iterator[None]:
        """Turns what grpclib, h2 and protobuf raise into errors of bkpool."""
        endpoint = self._connection.endpoint
        try:
            yield
        except GRPCError as error:
            status = f"{error.status.value} ({error.status.name})"
            raise WorkerFailed(f"buildkitd answered {call} with grpc-status {status}") from error
        except StreamTerminatedError as error:
            raise self._lost(call, str(error)[:_QUOTED]) from error
        except TimeoutError:
            raise Unavailable(f"{endpoint} did not answer {call} within {seconds:g} s") from None
        except (OSError, ProtocolError) as error:
            raise self._lost(call, "the connection was lost") from error
        except (DecodeError, NotImplementedError, AssertionError, ValueError, OverflowError) as error:
            # grpclib raises the second for a compressed message, the third for one that ends too early.
            raise WorkerFailed(f"{endpoint} answered {call} with something else than BuildKit's API has") from error

    def _lost(self, call: str, reason: str) -> BkpoolError:
        endpoint, violation = self._connection.endpoint, self._connection.violation
        if violation is not None:
            return WorkerFailed(f"what listens on {endpoint} does not speak HTTP/2: {str(violation)[:_QUOTED]}")
        return Unavailable(f"{endpoint} broke off the call {call}: {self._connection.lost_because or reason}")


def _name(method: str) -> str:
    """`Info`, of `/moby.buildkit.v1.Control/Info`."""
    return method.rpartition("/")[2]


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else asyncio.get_running_loop().time() + seconds


async def _in_own_task(work: Coroutine[Any, Any, _Result], deadline: float | None) -> _Result:
    """Awaits a coroutine of grpclib in a task that ends with it.

    When a connection is lost, grpclib 0.4.9 cancels the task that waits and raises its own error instead, but never
    calls `uncancel()`. A caller's `asyncio.timeout` or TaskGroup would count that cancellation later.
    """
    async with asyncio.timeout_at(deadline):
        return await asyncio.create_task(work)
