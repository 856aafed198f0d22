"""The rules of a relay (net.duplex), without a socket."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.gateway.net.buffers import CIPHERTEXT_CHUNK, PLAINTEXT_CHUNK, RECORD_OVERHEAD, LoopBuffers
from bkpool.gateway.net.duplex import DuplexRelay, PeerStream
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.net.tls_stream import TlsStream


class PlainRelay:
    """Two peers without TLS. A peer's socket accepts only as many bytes as the test says."""

    def __init__(self):
        self.buffers = LoopBuffers()
        self.peers = PeerStream(), PeerStream()
        self.duplex = DuplexRelay(*self.peers, self.buffers.plaintext)
        self.sent_by = [b"", b""]
        self.accepted_by = [b"", b""]

    def receive_from(self, number, data):
        """Passes in bytes of this peer. Empty data is its end."""
        self.buffers.received[: len(data)] = data
        self.duplex.received(self.peers[number], self.buffers.received[: len(data)])
        self.sent_by[number] += data
        self.accept(1 - number, 0)  # a relay tries to send at once, and keeps the rest
        self.buffers.received[:100] = self.buffers.plaintext[:100] = b"\xee" * 100

    def accept(self, number, count):
        """Lets this peer's socket accept this many bytes."""
        count = min(count, len(self.peers[number].unsent))
        self.accepted_by[number] += bytes(self.peers[number].unsent[:count])
        self.peers[number].sent(count)


def test_a_peer_is_not_read_while_the_other_has_unsent_bytes():
    relay = PlainRelay()
    a, b = relay.peers
    relay.receive_from(0, b"hello")
    assert not relay.duplex.may_read(a)
    assert relay.duplex.may_read(b)
    relay.accept(1, 4)
    assert not relay.duplex.may_read(a)
    relay.accept(1, 1)
    assert relay.duplex.may_read(a)
    assert relay.accepted_by[1] == b"hello"


def test_the_end_of_one_direction_does_not_end_the_other():
    relay = PlainRelay()
    a, b = relay.peers
    relay.receive_from(0, b"")
    assert b.eof_queued
    assert relay.duplex.half_open
    assert not relay.duplex.finished
    assert not relay.duplex.may_read(a)
    relay.receive_from(1, b"answer")
    relay.receive_from(1, b"")
    assert not relay.duplex.finished, "the answer is not sent yet"
    relay.accept(0, 6)
    assert relay.duplex.finished


def test_a_peer_that_accepts_nothing_more_can_still_send():
    relay = PlainRelay()
    a, b = relay.peers
    b.close_write()
    assert not relay.duplex.may_read(a)
    relay.receive_from(1, b"last bytes")
    relay.accept(0, 100)
    assert relay.accepted_by[0] == b"last bytes"
    relay.receive_from(1, b"")
    assert relay.duplex.finished


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("receive"), st.integers(0, 1), st.binary(max_size=50)),
            st.tuples(st.just("accept"), st.integers(0, 1), st.integers(0, 60)),
        ),
        max_size=60,
    )
)
def test_in_any_order_of_events_every_byte_arrives_once_and_before_the_end(events):
    relay = PlainRelay()
    for what, number, argument in events:
        if what == "accept":
            relay.accept(number, argument)
        elif relay.duplex.may_read(relay.peers[number]):
            relay.receive_from(number, argument)
        for one in (0, 1):
            assert len(relay.peers[one].unsent) <= PLAINTEXT_CHUNK
            assert relay.peers[one].eof_queued == relay.peers[1 - one].eof_received
    for number in (0, 1):
        relay.accept(number, 1000)
        if not relay.peers[number].eof_received:
            relay.receive_from(number, b"")
        assert relay.accepted_by[1 - number] + bytes(relay.peers[1 - number].unsent) == relay.sent_by[number]
    relay.accept(0, 1000)
    relay.accept(1, 1000)
    assert relay.duplex.finished


@pytest.fixture
def tls_pair(ca):
    """A client and a server after their TLS handshake."""
    certificate = ca.server()
    server = TlsStream(server_context(certificate.cert, certificate.key, ca.pem))
    client = TlsStream(ca.client_context(), server_side=False, server_hostname="localhost")
    client.handshake(memoryview(b""))
    server.handshake(memoryview(client.take()))
    assert client.handshake(memoryview(server.take()))
    assert server.handshake(memoryview(client.take()))
    return client, server


def test_a_tls_peer_can_still_send_after_our_close_notify(tls_pair):
    client, server = tls_pair
    buffers = LoopBuffers()
    peer = PeerStream(server)
    peer.write_eof()
    assert client.decrypt(memoryview(bytes(peer.unsent)), memoryview(bytearray(100_000))) == (0, True)
    peer.sent(len(peer.unsent))
    client.encrypt(memoryview(b"one more thing"))
    assert bytes(peer.decode(memoryview(client.take()), buffers.plaintext)) == b"one more thing"
    assert not peer.eof_received
    client.close_notify()
    assert bytes(peer.decode(memoryview(client.take()), buffers.plaintext)) == b""
    assert peer.eof_received
    peer.write_eof()
    assert not peer.unsent, "close_notify is sent only once"


def test_data_that_comes_together_with_close_notify_is_not_lost(tls_pair):
    client, server = tls_pair
    client.encrypt(memoryview(b"last bytes"))
    client.close_notify()
    peer = PeerStream(server)
    assert bytes(peer.decode(memoryview(client.take()), LoopBuffers().plaintext)) == b"last bytes"
    assert peer.eof_received


def test_a_chunk_of_the_largest_records_fits_into_the_buffer(tls_pair):
    client, server = tls_pair
    client.encrypt(memoryview(bytes(4 * PLAINTEXT_CHUNK)))
    data, peer, buffers = memoryview(client.take()), PeerStream(server), LoopBuffers()
    for start in range(0, len(data), PLAINTEXT_CHUNK):
        peer.decode(data[start : start + PLAINTEXT_CHUNK], buffers.plaintext)
        assert not peer.eof_received
    assert peer.bytes_in == 4 * PLAINTEXT_CHUNK


def test_records_are_counted_right_when_each_read_ends_in_another_record(tls_pair):
    """Each part is as long as the records that it completes: by their lengths alone none would have to be counted."""
    client, server = tls_pair
    into = LoopBuffers().plaintext
    lengths, cut = [100, 300, 200], 50
    for length in lengths:
        client.encrypt(memoryview(bytes(length)))
    stream, begin = memoryview(client.take()), 0
    for length in lengths:
        end = min(len(stream), begin + length + RECORD_OVERHEAD + (0 if begin else cut))
        server.decrypt(stream[begin:end], into)
        begin = end
    assert begin == len(stream)
    assert server._records.between, "the counter knows that it has seen whole records"


TCP_PIECE = 65_536 - 20 - 32
"""Bytes that TCP passes on in one piece at most: 64 KiB less the headers of IPv4 and of TCP with timestamps."""


@pytest.mark.parametrize("length", [PLAINTEXT_CHUNK, CIPHERTEXT_CHUNK])
def test_one_chunk_leaves_no_small_piece_to_send(tls_pair, length):
    """A small piece would wake the peer for a few bytes, which costs 50 % more."""
    client, server = tls_pair
    if length == CIPHERTEXT_CHUNK:  # whole records
        server.encrypt(memoryview(bytes(8 * PLAINTEXT_CHUNK)))
        length, _ = client.decrypt(memoryview(server.take())[:CIPHERTEXT_CHUNK], LoopBuffers().plaintext)
        assert length % (PLAINTEXT_CHUNK // 3) == 0
    client.encrypt(memoryview(bytes(length)))
    assert not 0 < len(client.take()) % TCP_PIECE < TCP_PIECE // 2


def test_a_tls_violation_leaves_an_alert_to_send(tls_pair):
    _, server = tls_pair
    peer = PeerStream(server)
    with pytest.raises(ssl.SSLError):
        peer.decode(memoryview(b"GET / HTTP/1.1\r\n\r\n"), LoopBuffers().plaintext)
    assert bytes(peer.unsent)[:1] == b"\x17"  # an encrypted alert
