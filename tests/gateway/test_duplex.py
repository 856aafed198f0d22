"""The exchange as a conversation, without a socket."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.gateway.net.buffers import CIPHERTEXT_CHUNK, PLAINTEXT_CHUNK, LoopBuffers
from bkpool.gateway.net.duplex import DuplexRelay, PeerStream
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.net.tls_stream import TlsStream


class Conversation:
    """Two peers in the clear; each takes only what the test lets it take."""

    def __init__(self):
        self.buffers = LoopBuffers()
        self.ends = PeerStream(), PeerStream()
        self.exchange = DuplexRelay(*self.ends, self.buffers.plaintext)
        self.said = [b"", b""]
        self.taken = [b"", b""]

    def says(self, who, data):
        self.buffers.received[: len(data)] = data
        self.exchange.received(self.ends[who], self.buffers.received[: len(data)])
        self.said[who] += data
        self.takes(1 - who, 0)  # a driver tries to send at once, and keeps what is not taken
        self.buffers.received[:100] = self.buffers.plaintext[:100] = b"\xee" * 100

    def takes(self, who, count):
        count = min(count, len(self.ends[who].unsent))
        self.taken[who] += bytes(self.ends[who].unsent[:count])
        self.ends[who].sent(count)


def test_nothing_is_read_from_one_while_the_other_has_not_taken_what_there_is():
    talk = Conversation()
    a, b = talk.ends
    talk.says(0, b"hello")
    assert not talk.exchange.may_read(a)
    assert talk.exchange.may_read(b)
    talk.takes(1, 4)
    assert not talk.exchange.may_read(a)
    talk.takes(1, 1)
    assert talk.exchange.may_read(a)
    assert talk.taken[1] == b"hello"


def test_the_end_of_one_is_not_the_end_of_the_other():
    talk = Conversation()
    a, b = talk.ends
    talk.says(0, b"")
    assert b.eof_queued
    assert talk.exchange.half_open
    assert not talk.exchange.finished
    assert not talk.exchange.may_read(a)
    talk.says(1, b"answer")
    talk.says(1, b"")
    assert not talk.exchange.finished, "the answer is not sent"
    talk.takes(0, 6)
    assert talk.exchange.finished


def test_what_a_deaf_peer_is_told_is_dropped_and_its_own_words_pass():
    talk = Conversation()
    a, b = talk.ends
    b.close_write()
    assert not talk.exchange.may_read(a)
    talk.says(1, b"last words")
    talk.takes(0, 100)
    assert talk.taken[0] == b"last words"
    talk.says(1, b"")
    assert talk.exchange.finished


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("says"), st.integers(0, 1), st.binary(max_size=50)),
            st.tuples(st.just("takes"), st.integers(0, 1), st.integers(0, 60)),
        ),
        max_size=60,
    )
)
def test_in_any_order_of_events_every_byte_arrives_once_and_before_the_end(events):
    talk = Conversation()
    for what, who, argument in events:
        if what == "takes":
            talk.takes(who, argument)
        elif talk.exchange.may_read(talk.ends[who]):
            talk.says(who, argument)
        for one in (0, 1):
            assert len(talk.ends[one].unsent) <= PLAINTEXT_CHUNK
            assert talk.ends[one].eof_queued == talk.ends[1 - one].eof_received
    for who in (0, 1):
        talk.takes(who, 1000)
        if not talk.ends[who].eof_received:
            talk.says(who, b"")
        assert talk.taken[1 - who] + bytes(talk.ends[1 - who].unsent) == talk.said[who]
    talk.takes(0, 1000)
    talk.takes(1, 1000)
    assert talk.exchange.finished


@pytest.fixture
def tls_pair(ca):
    """Two Tls after their handshake with each other."""
    identity = ca.server()
    server = TlsStream(server_context(identity.cert, identity.key, ca.pem))
    client = TlsStream(ca.client_context(), server_side=False, server_hostname="localhost")
    client.handshake(memoryview(b""))
    server.handshake(memoryview(client.take()))
    assert client.handshake(memoryview(server.take()))
    assert server.handshake(memoryview(client.take()))
    return client, server


def test_a_tls_peer_can_be_told_the_end_and_still_be_heard(tls_pair):
    client, server = tls_pair
    buffers = LoopBuffers()
    end = PeerStream(server)
    end.write_eof()
    assert client.decrypt(memoryview(bytes(end.unsent)), memoryview(bytearray(100_000))) == (0, True)
    end.sent(len(end.unsent))
    client.encrypt(memoryview(b"one more thing"))
    assert bytes(end.decode(memoryview(client.take()), buffers.plaintext)) == b"one more thing"
    assert not end.eof_received
    client.close_notify()
    assert bytes(end.decode(memoryview(client.take()), buffers.plaintext)) == b""
    assert end.eof_received
    end.write_eof()
    assert not end.unsent, "the end is said once"


def test_an_end_that_comes_with_the_last_words_does_not_hide_them(tls_pair):
    client, server = tls_pair
    client.encrypt(memoryview(b"last words"))
    client.close_notify()
    end = PeerStream(server)
    assert bytes(end.decode(memoryview(client.take()), LoopBuffers().plaintext)) == b"last words"
    assert end.eof_received


def test_a_chunk_of_the_largest_records_fits(tls_pair):
    client, server = tls_pair
    client.encrypt(memoryview(bytes(4 * PLAINTEXT_CHUNK)))
    data, end, buffers = memoryview(client.take()), PeerStream(server), LoopBuffers()
    for start in range(0, len(data), PLAINTEXT_CHUNK):
        end.decode(data[start : start + PLAINTEXT_CHUNK], buffers.plaintext)
        assert not end.eof_received
    assert end.bytes_in == 4 * PLAINTEXT_CHUNK


PIECE = 65_536 - 20 - 32
"""What TCP hands on in one piece at most: 64 KiB with the headers of IPv4 and of TCP with timestamps."""


@pytest.mark.parametrize("length", [PLAINTEXT_CHUNK, CIPHERTEXT_CHUNK])
def test_what_is_read_at_once_is_sent_in_pieces_with_no_small_rest(tls_pair, length):
    """A rest would wake the peer for a few bytes: it cost half as much again."""
    client, server = tls_pair
    if length == CIPHERTEXT_CHUNK:  # ciphertext, of whole records
        server.encrypt(memoryview(bytes(8 * PLAINTEXT_CHUNK)))
        length, _ = client.decrypt(memoryview(server.take())[:CIPHERTEXT_CHUNK], LoopBuffers().plaintext)
        assert length % (PLAINTEXT_CHUNK // 3) == 0
    client.encrypt(memoryview(bytes(length)))
    assert not 0 < len(client.take()) % PIECE < PIECE // 2


def test_an_alert_is_unsent_after_what_tls_does_not_allow(tls_pair):
    _, server = tls_pair
    end = PeerStream(server)
    with pytest.raises(ssl.SSLError):
        end.decode(memoryview(b"GET / HTTP/1.1\r\n\r\n"), LoopBuffers().plaintext)
    assert bytes(end.unsent)[:1] == b"\x17"  # an encrypted alert
