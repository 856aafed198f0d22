from __future__ import annotations

import asyncio
import os
import struct

import pytest
import uvloop
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from bkpool.buildkit import ask_on_socket, ask_over_tls
from bkpool.buildkit.readiness import _Asking
from bkpool.buildkit.ready_call import LONGEST_ANSWER, REQUEST, ReadyCall
from bkpool.buildkit.stubs import control_pb2 as pb
from bkpool.core.errors import Unavailable, WorkerFailed
from support.stub_control import StubControl, serve, server_context, tls

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 32
RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]
MESSAGE = struct.pack(">BI", 0, 3) + b"abc"


def frame(kind: int, flags: int, payload: bytes = b"", stream: int = 1) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def block(*headers: tuple[str, str]) -> bytes:
    return Encoder().encode(list(headers))


GREETING = frame(SETTINGS, 0, struct.pack(">HI", 5, 16384), stream=0)
TRAILERS = frame(HEADERS, END_HEADERS | END_STREAM, block(("grpc-status", "0")))
OK = GREETING + frame(HEADERS, END_HEADERS, block(*RESPONSE)) + frame(DATA, 0, MESSAGE) + TRAILERS


def answer_to(data: bytes) -> ReadyCall:
    call = ReadyCall("unix:///s")
    call.receive(data)
    return call


# --- the answer -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, len(OK)), max_size=8))
def test_an_answer_may_come_in_pieces(cuts):
    call, begin = ReadyCall("unix:///s"), 0
    for end in [*sorted(cuts), len(OK)]:
        assert not call.answered
        call.receive(OK[begin:end])
        begin = max(begin, end)
        if begin == len(OK):
            break
    assert call.answered


def test_settings_and_pings_are_acknowledged():
    call = ReadyCall("unix:///s")
    ping = frame(PING, 0, b"12345678", stream=0)
    assert call.receive(GREETING + ping) == frame(SETTINGS, ACK, stream=0) + frame(PING, ACK, b"12345678", stream=0)
    assert call.receive(frame(SETTINGS, ACK, stream=0) + frame(PING, ACK, b"12345678", stream=0)) == b""


def test_frames_that_need_no_answer_are_left_out():
    update, unknown = frame(8, 0, bytes(4), stream=0), frame(99, 0, b"x", stream=0)
    assert answer_to(GREETING + update + unknown + OK.removeprefix(GREETING)).answered


def test_headers_may_be_padded_have_a_priority_and_be_in_pieces():
    headers = block(*RESPONSE)
    padded = bytes([3]) + bytes(5) + headers[:4] + bytes(3)
    start = frame(HEADERS, PADDED | PRIORITY, padded) + frame(CONTINUATION, END_HEADERS, headers[4:])
    data = frame(DATA, PADDED, bytes([2]) + MESSAGE + bytes(2))
    assert answer_to(GREETING + start + data + TRAILERS).answered


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_message_may_be_in_pieces(cut):
    headers = frame(HEADERS, END_HEADERS, block(*RESPONSE))
    pieces = frame(DATA, 0, MESSAGE[:cut]) + frame(DATA, 0, MESSAGE[cut:])
    assert answer_to(GREETING + headers + pieces + TRAILERS).answered


def judged(*headers: tuple[str, str], message: bytes = MESSAGE) -> bytes:
    """An answer with these headers in its trailers."""
    trailers = frame(HEADERS, END_HEADERS | END_STREAM, block(*headers))
    return GREETING + frame(HEADERS, END_HEADERS, block(*RESPONSE)) + frame(DATA, 0, message) + trailers


def at_once(*headers: tuple[str, str]) -> bytes:
    """An answer of headers alone."""
    return GREETING + frame(HEADERS, END_HEADERS | END_STREAM, block(*headers))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (judged(("grpc-status", "14")), "answered ListWorkers with grpc-status 14"),
        (judged(("x", "y")), "with grpc-status none"),
        (at_once(*RESPONSE, ("grpc-status", "12")), "with grpc-status 12"),
        (at_once((":status", "404")), "HTTP status 404"),
        (at_once((":status", "200"), ("content-type", "text/html")), "no gRPC"),
        (at_once(*RESPONSE, ("grpc-status", "0")), "without a message"),
        (judged(("grpc-status", "0"), message=MESSAGE[:-1]), "something else than BuildKit's API"),
        (judged(("grpc-status", "0"), message=MESSAGE + b"d"), "something else than BuildKit's API"),
        (judged(("grpc-status", "0"), message=b"\1" + MESSAGE[1:]), "something else than BuildKit's API"),
        (judged(("grpc-status", "0"), message=b"\0"), "something else than BuildKit's API"),
    ],
)
def test_an_answer_that_is_not_ok(data, message):
    with pytest.raises(WorkerFailed, match=message):
        answer_to(data)


def test_an_answer_without_an_end_is_bounded():
    full = frame(DATA, 0, bytes(16384))
    call = answer_to(GREETING + frame(HEADERS, END_HEADERS, block(*RESPONSE)))
    with pytest.raises(WorkerFailed, match="more than"):
        call.receive(full * (LONGEST_ANSWER // 16384 + 1))
    assert len(call._message) == 5


def test_headers_without_an_end_are_bounded():
    call = answer_to(GREETING + frame(HEADERS, 0, bytes(16384)))
    with pytest.raises(WorkerFailed, match="headers are too long"):
        call.receive(frame(CONTINUATION, 0, bytes(16384)) * 4)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(PING, 0, bytes(8), stream=0),
        GREETING + frame(DATA, 0, stream=0),
        GREETING + frame(HEADERS, END_HEADERS, block(*RESPONSE), stream=2),
        GREETING + frame(PUSH_PROMISE, END_HEADERS, bytes(4)),
        GREETING + frame(CONTINUATION, END_HEADERS, block(*RESPONSE)),
        GREETING + frame(HEADERS, 0, b"") + frame(PING, 0, bytes(8), stream=0),
        GREETING + frame(HEADERS, END_HEADERS, b"\xff\xff\xff"),
        GREETING + frame(DATA, PADDED, bytes([9])),
        GREETING + (16_385).to_bytes(3, "big") + bytes(6),
    ],
)
def test_a_breach_of_http2(data):
    with pytest.raises(WorkerFailed, match="what listens on unix:///s does not speak HTTP/2: "):
        answer_to(data)


@pytest.mark.parametrize(
    "data", [frame(RST_STREAM, 0, bytes(4)), frame(GOAWAY, 0, bytes(8), stream=0)], ids=["reset", "goaway"]
)
def test_a_call_that_is_broken_off(data):
    with pytest.raises(Unavailable, match="broke off the call ListWorkers"):
        answer_to(GREETING + data)


# --- the connection -------------------------------------------------------------------------------------------------


async def test_a_long_answer_of_another_implementation(control, socket_path):
    control.workers = [pb.WorkerRecord(ID="w", Labels={str(n): "x" * 1000 for n in range(900)})]
    async with serve(control, path=str(socket_path)):
        assert await ask_on_socket(socket_path) == os.getpid()
    assert control.requests == [pb.ListWorkersRequest()]


async def test_over_tls(control, tmp_path):
    async with serve(control, host="127.0.0.1", port=0, ssl=server_context(tmp_path)) as server:
        port = server._server.sockets[0].getsockname()[1]
        await ask_over_tls("tcp://w", "127.0.0.1", port, tls())
        with pytest.raises(WorkerFailed, match="uid-2"):
            await ask_over_tls("tcp://w", "127.0.0.1", port, tls("uid-2"))
    assert len(control.requests) == 1  # the second worker was not called


class Written(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.all = b""

    def write(self, data) -> None:
        self.all += data


async def test_nothing_is_acknowledged_before_the_request():
    """buildkitd speaks as soon as it is connected to, and then hears the acknowledgement instead of the preface."""
    asking, written = _Asking("unix:///s"), Written()
    asking.connection_made(written)
    asking.data_received(GREETING)
    assert written.all == b""
    answer = asyncio.create_task(asking.answer())
    await asyncio.sleep(0)
    assert written.all == REQUEST + frame(SETTINGS, ACK, stream=0)
    asking.data_received(OK.removeprefix(GREETING))
    await answer


def test_it_works_on_uvloop_too(socket_path):
    async def main() -> None:
        async with serve(StubControl(), path=str(socket_path)):
            assert await ask_on_socket(socket_path) == os.getpid()

    uvloop.run(main())


async def test_a_call_that_is_given_up_closes_its_connection(control, socket_path):
    control.stalled = True
    async with serve(control, path=str(socket_path)):
        asking = asyncio.create_task(ask_on_socket(socket_path))
        await asyncio.wait_for(control.called.wait(), 60)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(control.cancelled.wait(), 60)


async def test_an_answer_that_takes_too_long(control, socket_path, monkeypatch):
    monkeypatch.setattr("bkpool.buildkit.readiness._LONGEST", 0.2)
    control.stalled = True
    async with serve(control, path=str(socket_path)):
        with pytest.raises(Unavailable, match=r"did not answer ListWorkers within 0\.2 s"):
            await ask_on_socket(socket_path)
        await asyncio.wait_for(control.cancelled.wait(), 60)
