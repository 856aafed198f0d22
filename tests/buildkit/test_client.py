from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from google.protobuf.timestamp_pb2 import Timestamp
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived

from bkpool.buildkit import BuildEventType, BuildkitVersion, CallTimeouts, ContentDescriptor, connect
from bkpool.buildkit.connection import MAX_MESSAGE
from bkpool.buildkit.stubs import control_pb2 as pb
from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.pki.authority import Authority
from support.stub_control import NOW, StubControl, serve, server_context, tls

QUICK = CallTimeouts(connect=0.2, answer=0.2, disk_usage=0.2, prune=0.2)
PATIENT = CallTimeouts(connect=60.0, answer=60.0, disk_usage=60.0, prune=60.0)


def at(second: int) -> Timestamp:
    return Timestamp(seconds=second)


def event(number: int, kind: int = pb.STARTED) -> pb.BuildHistoryEvent:
    return pb.BuildHistoryEvent(type=kind, record=pb.BuildHistoryRecord(Ref=f"ref-{number}"))


# --- what the calls return ------------------------------------------------------------------------------------------


async def test_info_and_workers(control, endpoint):
    control.version = pb.BuildkitVersion(package="p", version="v0.34.2", revision="r")
    arm = pb.Platform(OS="linux", Architecture="arm", Variant="v7")
    control.workers = [
        pb.WorkerRecord(ID="w", Labels={"a": "b"}, platforms=[pb.Platform(OS="linux", Architecture="amd64"), arm])
    ]
    async with connect(endpoint) as client:
        await client.list_workers()
        assert await client.info() == BuildkitVersion("p", "v0.34.2", "r")
        (worker,) = await client.list_workers()
        assert client.peer_pid == os.getpid()
    assert worker.platforms == ("linux/amd64", "linux/arm/v7")
    assert worker.labels == {"a": "b"}


async def test_disk_usage(control, endpoint):
    control.usage = [
        pb.UsageRecord(ID="a", Size=2**40, InUse=True, RecordType="regular", CreatedAt=at(1), Parents=["b", "c"]),
        pb.UsageRecord(ID="b"),
    ]
    async with connect(endpoint) as client:
        first, second = await client.disk_usage(filters=["type==regular"])
    assert control.requests == [pb.DiskUsageRequest(filter=["type==regular"])]
    assert (first.id, first.size, first.in_use, first.record_type) == ("a", 2**40, True, "regular")
    assert first.created_at == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert first.last_used_at is None
    assert first.parents == ("b", "c")
    assert second.created_at is None


async def test_prune_says_what_may_stay_and_yields_what_was_deleted(control, endpoint):
    control.usage = [pb.UsageRecord(ID="a", Size=1), pb.UsageRecord(ID="b", Size=2)]
    async with connect(endpoint) as client:
        records = client.prune(
            filters=["type==regular"],
            include_internal=True,
            keep_duration=timedelta(hours=1, microseconds=1),
            reserved_space=1,
            max_used_space=2,
            min_free_space=3,
        )
        async with aclosing(records):
            assert [record.id async for record in records] == ["a", "b"]
    (request,) = control.requests
    assert request.keepDuration == 3_600_000_001_000
    assert request.all
    assert (request.reservedSpace, request.maxUsedSpace, request.minFreeSpace) == (1, 2, 3)


async def test_history(control, endpoint):
    done = pb.BuildHistoryRecord(
        Ref="r",
        Frontend="dockerfile.v0",
        error=pb.Status(code=2, message="exit code 1"),
        CreatedAt=at(1),
        CompletedAt=at(3),
        logs=pb.Descriptor(media_type="m", digest="d", size=9),
        numTotalSteps=5,
        numCachedSteps=4,
        numCompletedSteps=3,
        numWarnings=2,
    )
    control.events = [event(1), pb.BuildHistoryEvent(type=pb.COMPLETE, record=done), event(1, pb.DELETED)]
    async with connect(endpoint) as client:
        history = client.history(active_only=True, ref="r", early_exit=True, filters=["f"], limit=7)
        async with aclosing(history):
            events = [seen async for seen in history]
    assert control.requests == [
        pb.BuildHistoryRequest(ActiveOnly=True, Ref="r", EarlyExit=True, Filter=["f"], Limit=7)
    ]
    assert [seen.type for seen in events] == list(BuildEventType)
    started, completed = events[0].record, events[1].record
    assert started.completed_at is started.log is started.trace is None
    assert (completed.error_code, completed.error) == (2, "exit code 1")
    assert (completed.total_steps, completed.cached_steps, completed.completed_steps) == (5, 4, 3)
    assert completed.warnings == 2
    assert completed.completed_at - completed.created_at == timedelta(seconds=2)
    assert completed.log == ContentDescriptor("m", "d", 9)


async def test_calls_run_beside_a_stream(control, endpoint):
    control.events, control.stalled = [event(1)], True
    async with connect(endpoint) as client, aclosing(client.history()) as history:
        assert (await anext(history)).record.ref == "ref-1"
        control.stalled = False
        await asyncio.gather(*(client.list_workers() for _ in range(5)))


async def test_a_stream_that_nobody_reads_any_more_is_cancelled_at_the_server(control, endpoint):
    control.events, control.stalled = [event(1)], True
    async with connect(endpoint) as client:
        async with aclosing(client.history()) as history:
            await anext(history)
        await asyncio.wait_for(control.cancelled.wait(), 60)
        control.stalled = False
        await client.list_workers()


async def test_a_slow_reader_holds_the_server_up(control, endpoint):
    """Flow control: what is sent waits at the server, and not in this process."""
    control.events = [
        pb.BuildHistoryEvent(record=pb.BuildHistoryRecord(Ref=f"{number:04}" + "x" * 2**18)) for number in range(200)
    ]
    async with connect(endpoint) as client, aclosing(client.history()) as history:
        await anext(history)
        for _ in range(20):
            await asyncio.sleep(0.005)
        buffered = sum(stream.data_received for stream in client._connection._protocol.processor.streams.values())
        assert buffered < 2**22
        assert len([seen async for seen in history]) == 199


def test_it_works_on_uvloop_too(socket_path):
    async def main() -> None:
        control = StubControl(events=[event(1)])
        async with serve(control, path=str(socket_path)), connect(f"unix://{socket_path}") as client:
            await client.list_workers()
            assert client.peer_pid == os.getpid()
            assert [seen.record.ref async for seen in client.history()] == ["ref-1"]

    uvloop.run(main())


# --- what goes wrong ------------------------------------------------------------------------------------------------


async def test_an_error_of_buildkitd_is_named_and_its_text_is_not_repeated(control, endpoint):
    control.failure = GRPCError(Status.NOT_FOUND, "no build of anna")
    async with connect(endpoint) as client:
        with pytest.raises(
            WorkerFailed, match=r"^buildkitd answered Info with grpc-status 5 \(NOT_FOUND\)$"
        ) as error:
            await client.info()
        assert error.value.__cause__.message == "no build of anna"
        with pytest.raises(WorkerFailed, match="ListenBuildHistory with grpc-status 5"):
            await anext(client.history())


async def test_a_call_without_an_answer_ends_in_time_and_is_cancelled_at_the_server(control, endpoint):
    control.stalled = True
    async with connect(endpoint, timeouts=replace(QUICK, connect=60.0)) as client:
        with pytest.raises(Unavailable, match=r"did not answer Info within 0\.2 s"):
            await client.info()
        await asyncio.wait_for(control.cancelled.wait(), 60)
        with pytest.raises(Unavailable, match=r"did not answer Prune within 0\.2 s"):
            await anext(client.prune())


async def test_nobody_there(socket_path):
    with pytest.raises(Unavailable, match="cannot be reached: No such file") as error:
        async with connect(f"unix://{socket_path}"):
            pass
    assert isinstance(error.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "http://127.0.0.1:1", "/run/s", "tcp://127.0.0.1"])
async def test_an_endpoint_of_another_kind_is_refused(endpoint):
    with pytest.raises(ValueError, match="not unix"):
        async with connect(endpoint):
            pass


@pytest.mark.parametrize("call", ["unary", "stream"])
async def test_a_connection_that_is_lost_in_the_middle_of_a_call(control, socket_path, call):
    control.stalled = True
    async with serve(control, path=str(socket_path)), connect(f"unix://{socket_path}") as client:

        async def make_call() -> int:
            with pytest.raises(Unavailable, match="broke off the call"):
                await (client.info() if call == "unary" else anext(client.history()))
            return asyncio.current_task().cancelling()

        task = asyncio.create_task(make_call())
        await asyncio.wait_for(control.called.wait(), 60)
        control.transports[0].abort()
        # grpclib cancels the waiting task. A timeout or a TaskGroup around the call must not count that.
        assert await asyncio.wait_for(task, 60) == 0
        with pytest.raises(Unavailable, match="lost"):
            await client.list_workers()
        assert len(control.requests) == 1  # it never connects a second time


class Raw:
    """A server that speaks HTTP/2 by hand, for what a well-made one would not send."""

    def __init__(self, path: Path, answer) -> None:
        self._path, self._answer = path, answer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                for seen in connection.receive_data(data):
                    if isinstance(seen, RequestReceived):
                        self._answer(connection, seen.stream_id)
                writer.write(connection.data_to_send())
                await writer.drain()
        writer.close()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return f"unix://{self._path}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()


OK, GRPC = [(":status", "200"), ("content-type", "application/grpc")], [("grpc-status", "0")]


def answering(data: bytes, headers=OK, trailers=GRPC):
    def answer(connection: H2Connection, stream: int) -> None:
        connection.send_headers(stream, headers)
        for start in range(0, len(data), 16384):
            connection.send_data(stream, data[start : start + 16384])
        connection.send_headers(stream, trailers, end_stream=True)

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answering(b""), "with OK but without a message"),
        (answering(b"\0\0\0\0\2\xff\xff"), "something else than BuildKit's API"),
        (answering(b"\0\0\0\0\2x"), "something else than BuildKit's API"),
        (answering(b"\1\0\0\0\2xx"), "something else than BuildKit's API"),
        (answering(b"", headers=[(":status", "404")]), "grpc-status 12"),
        (answering(b"", headers=[(":status", "200"), ("content-type", "text/html")]), "grpc-status 2"),
        (answering(b"\0\0\0\0\0", trailers=[("x", "y")]), "grpc-status 2"),
        (answering(b"\0" + struct.pack(">I", MAX_MESSAGE + 1)), f"a message of {MAX_MESSAGE + 1} bytes"),
    ],
    ids=["empty", "garbage", "cut off", "compressed", "404", "html", "no status", "too large"],
)
async def test_an_answer_that_is_none(socket_path, answer, message):
    async with Raw(socket_path, answer) as endpoint, connect(endpoint, timeouts=PATIENT) as client:
        with pytest.raises(WorkerFailed, match=message):
            await client.info()


async def test_an_event_of_an_unknown_type_is_an_error(control, endpoint):
    control.events = [event(1, 99)]
    async with connect(endpoint) as client:
        with pytest.raises(WorkerFailed, match="something else than BuildKit's API"):
            await anext(client.history())


# --- over mutual TLS ------------------------------------------------------------------------------------------------


async def test_over_tls(control, tmp_path):
    async with serve(control, host="127.0.0.1", port=0, ssl=server_context(tmp_path)) as server:
        port = server._server.sockets[0].getsockname()[1]
        async with connect(f"tcp://127.0.0.1:{port}", tls=tls()) as client:
            await client.list_workers()
        with pytest.raises(WorkerFailed, match="uid-2") as error:
            async with connect(f"tcp://127.0.0.1:{port}", tls=tls("uid-2")) as client:
                await client.list_workers()
        assert error.value.code == "WrongWorker"
        assert len(control.requests) == 1  # the second worker was not called
        with pytest.raises(Unavailable):
            async with connect(f"tcp://127.0.0.1:{port}", tls=tls(authority=Authority.create(NOW))) as client:
                await client.list_workers()
        assert len(control.requests) == 1


async def test_a_handshake_that_never_ends_is_given_up():
    hung_up = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()
        hung_up.set()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unavailable, match=r"did not accept a connection within 0\.2 s"):
            async with connect(endpoint, tls=tls(), timeouts=QUICK):
                pass
        await asyncio.wait_for(hung_up.wait(), 60)
