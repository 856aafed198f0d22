"""Every TLS server uses the allowed groups only, and costs a stranger's attack nothing. Run on each OpenSSL there is.

The attacks are ClientHellos made by hand; the good clients are OpenSSL's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import bkpool
from bkpool.gateway.control.server import new_loop
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from bkpool.ports.client_hello import HelloReader, offered_groups
from bkpool.ports.server_tls import ALLOWED_GROUPS, RefusedHelloError, new_server_context
from support.hellos import GROUPS, client_hello, hello_with_groups, in_records

SERVER_HELLO, HELLO_RETRY = "it answered", "it asked for another share"
RETRY_RANDOM = bytes.fromhex("CF21AD74E59A6111BE1D8C021E65B891C2A211167ABB8C5E079E09E2C8A8339C")  # RFC 8446 4.1.3
NEWEST, OLDER = ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2
OFFERED = frozenset(offered_groups(HelloReader().feed(client_hello()) or b"").supported)
"""What this OpenSSL has."""


@pytest.fixture(scope="module")
def authority():
    return Authority.create(datetime.now(UTC))


@pytest.fixture(scope="module")
def new_context(authority):
    def make(minimum_version):
        now = datetime.now(UTC)
        leaf = authority.issue_server(["localhost"], [], now, now + timedelta(hours=1))
        made = new_server_context(minimum_version)
        load_chain(made, leaf.cert_pem, leaf.key_pem or b"")
        return made

    return make


@pytest.fixture(scope="module", params=[NEWEST, OLDER], ids=["1.3", "1.2 and newer"])
def context(request, new_context):
    return new_context(request.param)


class Server:
    """The server's side of one connection."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def take(self, data: bytes) -> str:
        """Gives it bytes of a client, and returns what it answers."""
        self.incoming.write(data)
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            answer = self.outgoing.read()
            if not answer:
                return "nothing"
            return HELLO_RETRY if answer[11:43] == RETRY_RANDOM else SERVER_HELLO
        except RefusedHelloError as error:
            assert self.outgoing.read()[:6] == b"\x15\3\3\0\2\2", "an alert says so"
            return error.reason
        except ssl.SSLError as error:
            return f"OpenSSL: {error.reason}"
        return "complete"


SLOW = ("ffdhe2048", "ffdhe3072", "ffdhe8192", "P-521", "X448")
NOT_ALLOWED = "the client offers groups for key exchange that are not allowed"


@pytest.mark.parametrize("slow", [name for name in SLOW if GROUPS[name][0] in OFFERED])
@pytest.mark.parametrize(
    ("shares", "supported"),
    [
        (["{}"], ["{}"]),
        (["{}"], ["X25519", "{}"]),
        (["X25519", "{}"], ["X25519", "{}"]),
        (["{}", "X25519"], ["{}", "X25519"]),
        ([], ["{}"]),
        (["GREASE"], ["GREASE", "{}"]),
    ],
    ids=["alone", "others supported", "second", "first", "asked for", "asked for, after a number without meaning"],
)
def test_a_share_of_a_slow_group_is_refused_before_openssl_computes(context, slow, shares, supported):
    hello = hello_with_groups([name.format(slow) for name in shares], [name.format(slow) for name in supported])
    for size in (16384, 50):
        assert Server(context).take(in_records(hello, size)) == NOT_ALLOWED


def test_a_slow_share_in_many_segments_is_refused(context):
    server = Server(context)
    data = in_records(hello_with_groups(["ffdhe8192"]), 40)
    assert {server.take(data[at : at + 1]) for at in range(len(data) - 1)} == {"nothing"}
    assert server.take(data[-1:]) == NOT_ALLOWED


def test_a_client_that_was_asked_for_another_share_gets_no_slow_one_accepted(context):
    server = Server(context)
    assert server.take(in_records(hello_with_groups([], ["ffdhe8192", "X25519"]))) == HELLO_RETRY
    assert server.take(in_records(hello_with_groups(["ffdhe8192"], ["ffdhe8192", "X25519"]))).startswith("OpenSSL: ")


def test_the_slow_groups_are_the_last_ones_of_openssl_so_it_asks_for_none_of_them():
    supported = offered_groups(HelloReader().feed(client_hello()) or b"").supported
    allowed = [at for at, group in enumerate(supported) if group in ALLOWED_GROUPS]
    slow = [at for at, group in enumerate(supported) if 0x100 <= group < 0x200]
    assert max(allowed) < min(slow, default=len(supported))


@pytest.mark.parametrize("group", ["X25519", "P-256", "P-384"])
def test_an_allowed_group_is_used(context, group):
    assert Server(context).take(in_records(hello_with_groups([group]))) == SERVER_HELLO
    assert Server(context).take(in_records(hello_with_groups([], [group]))) == HELLO_RETRY


def test_a_hello_as_large_as_a_slow_one_is_accepted(context):
    """Go offers X25519MLKEM768, and before it offered a draft of it. Servers without it take the second share."""
    hello = hello_with_groups(["GREASE", "X25519Kyber768Draft00", "X25519"])
    assert len(hello) > len(hello_with_groups(["ffdhe8192"]))
    assert Server(context).take(in_records(hello)) == SERVER_HELLO
    if GROUPS["X25519MLKEM768"][0] not in OFFERED:  # else our share must be a real one; the next test has one
        assert Server(context).take(in_records(hello_with_groups(["X25519MLKEM768", "X25519"]))) == SERVER_HELLO


def test_shares_without_a_list_of_groups_are_not_computed_with(context):
    assert Server(context).take(in_records(hello_with_groups(["ffdhe8192"], []))).startswith("OpenSSL: ")


def test_a_malformed_hello_is_refused(context):
    hello = bytearray(hello_with_groups(["X25519"]))
    hello[-34:-32] = b"\xff\xff"  # the length of the share
    assert Server(context).take(in_records(bytes(hello))).startswith("the ClientHello is malformed")


@pytest.mark.parametrize(
    ("minimum", "version", "curve"),
    [
        *((minimum, NEWEST, curve) for minimum in (NEWEST, OLDER) for curve in ("X25519", "prime256v1", "secp384r1")),
        *((minimum, NEWEST, None) for minimum in (NEWEST, OLDER)),
        (OLDER, OLDER, None),
        (OLDER, OLDER, "prime256v1"),
    ],
)
def test_good_clients_complete_their_handshake(new_context, authority, minimum, version, curve):
    settings = ssl.create_default_context(cadata=authority.cert_pem.decode())
    settings.maximum_version = settings.minimum_version = version
    if curve:
        settings.set_ecdh_curve(curve)
    server = Server(new_context(minimum))
    to_client, from_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = settings.wrap_bio(to_client, from_client, server_hostname="localhost")
    for _ in range(4):
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        server.incoming.write(from_client.read())
        with contextlib.suppress(ssl.SSLWantReadError):
            server.tls.do_handshake()
        to_client.write(server.outgoing.read())
    client.write(b"x")
    server.incoming.write(from_client.read())
    assert server.tls.read(1) == b"x"


@pytest.mark.parametrize("make_loop", [asyncio.SelectorEventLoop, new_loop], ids=["asyncio", "uvloop"])
def test_servers_of_both_event_loops_read_the_hello_first(context, make_loop):
    async def attack() -> bytes:
        server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0, ssl=context)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            with contextlib.closing(writer):  # the end of the server waits for its connections
                writer.write(in_records(hello_with_groups(["ffdhe8192"])))
                return await reader.read()

    with asyncio.Runner(loop_factory=make_loop) as loop:
        answer = loop.run(asyncio.wait_for(attack(), 60))
    assert answer in {b"", b"\x15\3\3\0\2\2\x28"}, "no ServerHello, and at most an alert"


def test_no_server_makes_its_settings_elsewhere():
    root = Path(bkpool.__file__).parent
    makers = [path for path in root.rglob("*.py") if "PROTOCOL_TLS_SERVER" in path.read_text()]
    assert makers == [root / "ports" / "server_tls.py"]
