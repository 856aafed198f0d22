"""The HTTP/2 answer to a refused client, without a socket."""

from __future__ import annotations

from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.gateway.session.grpc_answer import GrpcAnswer
from bkpool.gateway.session.refusal import GrpcCode, Refusal


class Client:
    def __init__(self):
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()
        self.answers = {}
        self.goaway = False

    def call(self, stream):
        headers = [(":method", "POST"), (":scheme", "https"), (":path", "/x"), (":authority", "localhost")]
        self.http.send_headers(stream, headers)

    def receive(self, data):
        for event in self.http.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                self.answers[event.stream_id] = dict(event.headers)
            self.goaway |= isinstance(event, h2.events.ConnectionTerminated)


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def answer():
    return GrpcAnswer(Refusal(GrpcCode.UNAUTHENTICATED, "X", "100 % refused – sorry"))


def test_the_first_call_is_answered_and_followed_by_goaway(client, answer):
    client.receive(answer.receive(b""))
    client.receive(answer.receive(client.http.data_to_send()))
    assert not answer.finished
    client.call(1)
    client.receive(answer.receive(client.http.data_to_send()))
    headers = client.answers[1]
    assert headers[":status"] == "200"
    assert headers["content-type"] == "application/grpc"
    assert headers["grpc-status"] == "16"
    assert headers["grpc-message"] == "100 %25 refused %E2%80%93 sorry"
    assert client.goaway
    assert answer.finished


def test_all_calls_that_arrive_together_are_answered(client, answer):
    for stream in (1, 3, 5):
        client.call(stream)
    client.receive(answer.receive(client.http.data_to_send()))
    assert set(client.answers) == {1, 3, 5}


def test_bytes_may_arrive_one_by_one(client, answer):
    client.call(1)
    for byte in client.http.data_to_send():
        client.receive(answer.receive(bytes([byte])))
    assert client.answers[1]["grpc-status"] == "16"


def test_goaway_can_be_sent_without_a_call(client, answer):
    client.receive(answer.receive(b"") + answer.goaway())
    assert client.goaway


def test_a_goaway_of_the_client_finishes_the_answer(client, answer):
    client.http.close_connection()
    answer.receive(client.http.data_to_send())
    assert answer.finished


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4)
QUARTER_MEGABYTE = 256 * 1024
CHEAP_FRAMES = {
    "empty SETTINGS": frame(4),
    "acknowledgements": frame(4, flags=1),
    "PING": frame(6, bytes(8)),
    "PRIORITY": frame(2, b"\0\0\0\1\0", stream=3),
    "WINDOW_UPDATE": frame(8, b"\0\0\0\1"),
    "of no known type": frame(0x55),
    "ALTSVC, of which h2 tells nothing": frame(10, b"\0\1a"),
    "SETTINGS of 16 KB": frame(4, b"\0\4\0\0\xff\xff" * 2700),
}


class Counted:
    """Counts what h2 is given."""

    def __init__(self, http):
        self._http = http
        self.frames = self.bytes = 0

    def receive_data(self, data):
        self.frames += 1
        self.bytes += len(data)
        return self._http.receive_data(data)

    def __getattr__(self, name):
        return getattr(self._http, name)


@pytest.fixture
def counted(answer):
    answer._http = counted = Counted(answer._http)
    return counted


def feed(answer, data):
    """Gives it the data as a socket would, and returns what it sends."""
    sent = b""
    for at in range(0, len(data), 16384):
        if answer.finished:
            break
        sent += answer.receive(data[at : at + 16384])
    return sent


@pytest.mark.parametrize("cheap", CHEAP_FRAMES.values(), ids=CHEAP_FRAMES)
def test_a_client_that_sends_frames_and_no_call_is_told_to_go_after_a_hundred(client, answer, counted, cheap):
    client.receive(feed(answer, PREFACE + cheap * (QUARTER_MEGABYTE // len(cheap))))
    assert answer.finished
    assert client.goaway
    assert counted.frames <= 101
    assert counted.bytes <= 101 * 265


HEADER_BLOCKS = {
    "changes of the table's size": b"\x20" * 250_000,
    "the same field": b"\x82" * 250_000,
    "new fields": b"\x40\1a\1b" * 50_000,
}


@pytest.mark.parametrize("block", HEADER_BLOCKS.values(), ids=HEADER_BLOCKS)
def test_the_headers_of_a_call_are_not_unpacked(client, answer, counted, block):
    parts = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    more = b"".join(frame(9, part, flags=4 * (part is parts[-1]), stream=1) for part in parts[1:])
    client.call(1)
    client.receive(feed(answer, PREFACE + frame(1, parts[0], stream=1) + more))
    assert client.answers[1]["grpc-status"] == "16"
    assert counted.bytes < 100


def test_not_more_than_ten_calls_that_arrive_together_are_answered(client, answer):
    for stream in range(1, 41, 2):
        client.call(stream)
    client.receive(answer.receive(client.http.data_to_send()))
    assert set(client.answers) == set(range(1, 21, 2))
    assert client.goaway


def test_a_call_after_some_other_frames_is_answered(client, answer):
    for number in range(40):
        client.http.ping(number.to_bytes(8))
    client.http.increment_flow_control_window(65536)
    client.call(1)
    client.http.send_data(1, bytes(1000))
    client.call(3)
    client.receive(feed(answer, client.http.data_to_send()))
    assert set(client.answers) == {1, 3}


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_any_bytes_are_accepted_without_an_exception(chunks):
    answer = GrpcAnswer(Refusal(GrpcCode.UNAUTHENTICATED, "X", "no"))
    for chunk in chunks:
        if not answer.finished:
            answer.receive(chunk)


@given(st.text().map(lambda text: text.strip(" ")))  # HTTP does not keep outer spaces; no sentence of ours has them
def test_every_sentence_arrives_unchanged(sentence):
    client, answer = Client(), GrpcAnswer(Refusal(GrpcCode.FAILED_PRECONDITION, "X", sentence))
    client.call(1)
    client.receive(answer.receive(client.http.data_to_send()))
    assert unquote(client.answers[1]["grpc-message"]) == sentence
