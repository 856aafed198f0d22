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
