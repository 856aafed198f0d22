"""Fetching the keys of issuers: which responses are accepted, and how often an issuer is asked."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket

import pytest
from aiohttp import web
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bkpool.core.errors import Unauthenticated, Unavailable
from bkpool.identity.issuer_keys import FRESH_SECONDS, RETRY_SECONDS, STALE_SECONDS, IssuerKeys
from bkpool.identity.jwks import choose, read_discovery, read_keys
from bkpool.identity.jwt import ALGORITHMS
from support.issuer import DISCOVERY, JWKS, Issuer, b64, signing_key

RSA = signing_key().jwk
EC, ED = signing_key("ec", "ES256").jwk, signing_key("ed", "EdDSA").jwk


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def issuers(clock):
    issuers = IssuerKeys(clock=clock)
    yield issuers
    await issuers.close()


def without(jwk: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in jwk.items() if name not in names}


def same(key, jwk) -> bool:
    return key.Algorithm.to_jwk(key.key, as_dict=True).items() >= without(jwk, "kid", "use", "alg").items()


# --- what is asked, and how often -----------------------------------------------------------------------------------


async def test_keys_are_fetched_once_and_cached_for_a_while(issuer, issuers, clock):
    for _ in range(3):
        assert same(await issuers.key(issuer.url, "key-1", "RS256"), RSA)
        clock.pass_(FRESH_SECONDS / 3)
    assert (issuer.count(DISCOVERY), issuer.count(JWKS)) == (1, 1)
    await issuers.key(issuer.url, "key-1", "RS256")
    assert issuer.count() == 2


async def test_no_resolver_says_where_an_issuer_with_the_name_localhost_is(issuer, issuers, monkeypatch):
    """/etc/hosts, or who listens on ::1, would decide whose tokens are accepted."""
    asked, known = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **rest: asked.append(host) or known(host, *more, **rest)
    )
    url = issuer.url.replace("127.0.0.1", "localhost")
    issuer.answer(DISCOVERY, issuer.discovery(issuer=url, jwks_uri=f"{url}{JWKS}"))
    assert same(await issuers.key(url, "key-1", "RS256"), RSA)
    assert set(asked) <= {"127.0.0.1"}
    assert {request.headers["Host"] for request in issuer.requests} == {url.removeprefix("http://")}


async def test_the_request_reveals_nothing_and_stores_no_cookie(issuer, issuers, clock, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    issuer.answer(DISCOVERY, issuer.discovery(), headers={"Set-Cookie": "a=b; Path=/"})
    for _ in range(2):
        await issuers.key(issuer.url, "key-1", "RS256")
        clock.pass_(FRESH_SECONDS)
    for request in issuer.requests:
        assert request.headers["Accept-Encoding"] == "identity"
        assert not {"Cookie", "Authorization"} & set(request.headers)


async def test_fifty_callers_at_once_cause_one_request(issuer, issuers):
    held = issuer.hold(JWKS)
    asking = [asyncio.create_task(issuers.key(issuer.url, "key-1", "RS256")) for _ in range(50)]
    assert await asyncio.to_thread(held.reached.wait, 60)
    held.open()
    assert len({id(key) for key in await asyncio.gather(*asking)}) == 1
    assert (issuer.count(DISCOVERY), issuer.count(JWKS)) == (1, 1)


async def test_a_cancelled_caller_does_not_cancel_the_request_of_the_others(issuer, issuers):
    held = issuer.hold(JWKS)
    first, other = (asyncio.create_task(issuers.key(issuer.url, "key-1", "RS256")) for _ in range(2))
    assert await asyncio.to_thread(held.reached.wait, 60)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    held.open()
    assert await other
    assert issuer.count() == 1


async def test_a_thousand_invented_key_names_cause_two_requests_at_most(issuer, issuers, clock):
    names = [f"../../etc/{n}' OR 1=1 --" for n in range(500)]
    answers = await asyncio.gather(
        *(issuers.key(issuer.url, name, "RS256") for name in names), return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {Unauthenticated}
    for name in names:
        with pytest.raises(Unauthenticated, match="does not have a key "):
            await issuers.key(issuer.url, name, "RS256")
    assert issuer.count() == issuer.count(DISCOVERY) == 2
    clock.pass_(RETRY_SECONDS)
    with pytest.raises(Unauthenticated):
        await issuers.key(issuer.url, "more", "RS256")
    assert issuer.count() == 3


async def test_a_new_key_is_found_at_once(issuer, issuers, clock):
    await issuers.key(issuer.url, "key-1", "RS256")
    new = issuer.rotate("key-2")
    assert same(await issuers.key(issuer.url, "key-2", "RS256"), new.jwk)
    with pytest.raises(Unauthenticated, match="'key-1'"):  # and the old one is no more
        await issuers.key(issuer.url, "key-1", "RS256")


async def test_all_callers_with_a_new_key_at_once_find_it(issuer, issuers):
    await issuers.key(issuer.url, "key-1", "RS256")
    issuer.rotate("key-2")
    assert all(await asyncio.gather(*(issuers.key(issuer.url, "key-2", "RS256") for _ in range(5))))
    assert issuer.count() == 2


async def test_a_key_that_appears_during_a_request_is_found(issuer, issuers):
    held = issuer.hold(JWKS)
    old = asyncio.create_task(issuers.key(issuer.url, "key-1", "RS256"))
    assert await asyncio.to_thread(held.reached.wait, 60)
    issuer.rotate("key-2")
    new = asyncio.create_task(issuers.key(issuer.url, "key-2", "RS256"))
    held.open()
    assert await new
    await asyncio.wait([old])
    assert issuer.count() == 2


async def test_a_removed_key_is_refused_after_the_next_request(issuer, issuers, clock):
    await issuers.key(issuer.url, "key-1", "RS256")
    issuer.keys = []
    clock.pass_(FRESH_SECONDS)
    with pytest.raises(Unauthenticated, match="'key-1'"):
        await issuers.key(issuer.url, "key-1", "RS256")
    assert await issuers.probe(issuer.url) == 0


# --- an issuer that cannot be reached -------------------------------------------------------------------------------


async def test_an_issuer_that_is_down_is_not_flooded(issuer, issuers, clock):
    issuer.answer(DISCOVERY, b"", status=503)
    for _ in range(20):
        with pytest.raises(Unavailable, match=rf"{issuer.url} cannot be fetched.* HTTP 503") as refused:
            await issuers.key(issuer.url, "key-1", "RS256")
    assert refused.value.retry_after == RETRY_SECONDS
    assert len(issuer.requests) == 1
    issuer.answers.clear()
    clock.pass_(RETRY_SECONDS)
    assert await issuers.key(issuer.url, "key-1", "RS256")


async def test_cached_keys_are_used_for_an_hour_while_the_issuer_is_down(clock):
    issuers = IssuerKeys(clock=clock)
    try:
        with Issuer() as issuer:
            await issuers.key(issuer.url, "key-1", "RS256")
        clock.pass_(STALE_SECONDS - 1)
        assert await issuers.key(issuer.url, "key-1", "RS256")
        with pytest.raises(Unavailable, match="Connect"):  # a key that is not known may be a new one
            await issuers.key(issuer.url, "key-2", "RS256")
        with pytest.raises(Unavailable, match="Connect"):
            await issuers.probe(issuer.url)
        clock.pass_(1)
        with pytest.raises(Unavailable, match="Connect"):
            await issuers.key(issuer.url, "key-1", "RS256")
        with issuer:
            clock.pass_(RETRY_SECONDS)
            assert await issuers.key(issuer.url, "key-1", "RS256")
            assert await issuers.probe(issuer.url) == 1
    finally:
        await issuers.close()


async def test_a_probe_asks_again_after_a_failure_even_if_the_keys_are_fresh(issuer, issuers, clock):
    await issuers.key(issuer.url, "key-1", "RS256")
    issuer.answer(JWKS, b"<html>")
    with pytest.raises(Unavailable, match="JWK set is not JSON"):
        await issuers.key(issuer.url, "key-2", "RS256")
    with pytest.raises(Unavailable, match="JWK set is not JSON"):
        await issuers.probe(issuer.url)
    assert await issuers.key(issuer.url, "key-1", "RS256")
    issuer.answers.clear()
    clock.pass_(RETRY_SECONDS)
    assert await issuers.probe(issuer.url) == 1


@pytest.mark.parametrize("path", [DISCOVERY, JWKS])
async def test_an_issuer_that_does_not_respond_in_time(issuer, clock, path):
    issuer.hang(path)
    issuers = IssuerKeys(clock=clock, timeout=0.05)
    with pytest.raises(Unavailable, match=r"does not respond within 0\.05 s"):
        await issuers.key(issuer.url, "key-1", "RS256")
    await issuers.close()


async def test_closing_cancels_running_requests(issuer, clock):
    issuers = IssuerKeys(clock=clock)
    held = issuer.hold(JWKS)
    asking = asyncio.create_task(issuers.key(issuer.url, "key-1", "RS256"))
    assert await asyncio.to_thread(held.reached.wait, 60)
    await issuers.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
    held.open()


async def test_the_number_of_cached_issuers_is_limited(issuer, issuers, monkeypatch):
    monkeypatch.setattr("bkpool.identity.issuer_keys._MOST_ISSUERS", 2)
    await issuers.key(issuer.url, "key-1", "RS256")
    for port in (1, 2):
        with pytest.raises(Unavailable):
            await issuers.key(f"http://127.0.0.1:{port}", "key-1", "RS256")
    await issuers.key(issuer.url, "key-1", "RS256")
    assert issuer.count() == 2
    assert len(issuers._cache) == 2


# --- answers that are not taken -------------------------------------------------------------------------------------


async def why(issuers: IssuerKeys, issuer: Issuer) -> str:
    with pytest.raises(Unavailable) as refused:
        await issuers.key(issuer.url, "key-1", "RS256")
    return refused.value.message


@pytest.mark.parametrize("path", [DISCOVERY, JWKS])
async def test_ten_megabytes_are_not_read(issuer, issuers, path):
    sent = issuer.flood(path)
    assert "more than 512 KiB" in await why(issuers, issuer)
    assert len(sent) < 10


async def test_ten_megabytes_are_not_unpacked(issuer, issuers):
    bomb = gzip.compress(b" " * (10 << 20))
    issuer.answer(JWKS, bomb, headers={"Content-Encoding": "gzip"})
    assert "compressed" in await why(issuers, issuer)


@pytest.mark.parametrize(
    "to",
    [
        "http://evil.example/jwks",
        "https://127.0.0.1/jwks",
        "http://127.0.0.1:1/jwks",
        "http://127.0.0.1/jwks",
        "//evil.example/jwks",
        "http://{host}@evil.example/jwks",
        "http://{host}.evil.example/jwks",
        "http://{host}\\@evil.example/jwks",
        "http://[",
        "file:///etc/passwd",
        "",
    ],
)
async def test_a_redirect_to_another_host_is_not_followed(issuer, issuers, to):
    issuer.redirect(JWKS, to.format(host=f"127.0.0.1:{issuer.port}"))
    reason = await why(issuers, issuer)
    assert "redirects to another host, port or scheme" in reason or "ValueError" in reason
    assert issuer.count() == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_two_redirects_on_the_same_host_are_followed(issuer, issuers, status, clock):
    issuer.redirect(DISCOVERY, "/1", status)
    issuer.redirect("/1", f"{issuer.url}/2", status)
    issuer.answer("/2", issuer.discovery())
    assert await issuers.key(issuer.url, "key-1", "RS256")
    issuer.redirect("/2", "3", status)
    clock.pass_(STALE_SECONDS)
    assert "at most 2 are followed" in await why(issuers, issuer)


async def test_a_response_that_is_not_http_is_not_quoted(issuers):
    async def answer(reader, writer):
        await reader.readline()
        writer.write(b"SSH-2.0-inside\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="its response cannot be read") as refused:
            await issuers.key(f"http://127.0.0.1:{port}", "key-1", "RS256")
    assert "SSH" not in refused.value.message


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (DISCOVERY, {"issuer": "https://evil.example"}, "is of the issuer 'https://evil.example'"),
        (DISCOVERY, {"jwks_uri": "https://evil.example"}, "is of the issuer None"),
        (JWKS, [], "is not a JSON object"),
    ],
)
async def test_the_error_names_the_invalid_document(issuer, issuers, path, body, says):
    issuer.answer(path, body)
    assert says in await why(issuers, issuer)


async def test_an_issuer_with_a_path(clock):
    issuers = IssuerKeys(clock=clock)
    with Issuer(path="/realms/ci") as issuer:
        assert await issuers.probe(issuer.url) == 1
        with pytest.raises(Unavailable, match="is of the issuer"):  # to the letter, also here
            await issuers.probe(f"{issuer.url}/")
    await issuers.close()


async def test_the_document_of_an_issuer_with_a_slash_at_its_end(issuer, issuers):
    issuer.answer(DISCOVERY, issuer.discovery(issuer=f"{issuer.url}/"))
    assert await issuers.probe(f"{issuer.url}/") == 1


# --- documents: pure ------------------------------------------------------------------------------------------------

HTTPS, LOOPBACK = "https://issuer.example", "http://127.0.0.1:8888"


@pytest.mark.parametrize(
    ("issuer", "url"),
    [(HTTPS, "https://keys.example:444/a/b"), (LOOPBACK, "http://localhost:1/jwks"), (LOOPBACK, "https://a.example")],
)
def test_valid_urls_of_keys(issuer, url):
    assert read_discovery(json.dumps({"issuer": issuer, "jwks_uri": url}).encode(), issuer) == url


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"issuer": HTTPS}, "no jwks_uri"),
        ({"issuer": HTTPS, "jwks_uri": ["https://a"]}, "no jwks_uri"),
        ({"issuer": HTTPS, "jwks_uri": "http://keys.example"}, "must begin with https://"),
        ({"issuer": HTTPS, "jwks_uri": "http://127.0.0.1/jwks"}, "does not begin with https://"),
        ({"issuer": HTTPS, "jwks_uri": "file:///etc/passwd"}, "jwks_uri"),
        ({"issuer": HTTPS, "jwks_uri": "https://user@keys.example"}, "jwks_uri"),
        ({"issuer": HTTPS, "jwks_uri": "https://["}, "jwks_uri"),
        ({"issuer": f"{HTTPS}/", "jwks_uri": HTTPS}, "is of the issuer 'https://issuer.example/'"),
        ({"issuer": [HTTPS], "jwks_uri": HTTPS}, "is of the issuer ['https"),
        ([], "not a JSON object"),
    ],
    ids=str,
)
def test_an_invalid_discovery_document_is_refused(document, says):
    with pytest.raises(Unavailable) as refused:
        read_discovery(json.dumps(document).encode(), HTTPS)
    assert says in refused.value.message


def keys(*jwks: object):
    return read_keys(json.dumps({"keys": list(jwks)}).encode())


def test_usable_keys_are_read():
    found = keys(RSA, EC, ED, without(RSA, "kid", "use", "alg"), {**EC, "key_ops": ["verify", "sign"]})
    assert [(key.kid, key.alg) for key in found] == [
        *(("key-1", "RS256"), ("ec", "ES256"), ("ed", "EdDSA"), (None, "RS256"), ("ec", "ES256"))
    ]


@pytest.mark.parametrize(
    "jwk",
    [
        {**RSA, "use": "enc"},
        {**RSA, "use": ["sig"]},
        {**RSA, "key_ops": ["encrypt"]},
        {**RSA, "key_ops": "verify"},
        {**RSA, "alg": "RS512"},
        {**RSA, "alg": "RSA-OAEP"},
        {**RSA, "alg": "HS256"},
        {**RSA, "d": "AQAB"},
        {**RSA, "kty": "oct", "k": "c2VjcmV0"},
        {**RSA, "kty": ["RSA"]},
        {**RSA, "kid": 7},
        {**RSA, "kid": "k" * 257},
        {**RSA, "e": 65537},
        {**RSA, "e": b64(b"\x00")},
        {**RSA, "e": b64(b"\x02")},
        {**RSA, "n": ""},
        {**RSA, "n": "é"},
        {**RSA, "n": b64(b"\xff" * 4096)},
        without(RSA, "n"),
        signing_key("weak", bits=1024).jwk,
        signing_key("384", "ES384").jwk,
        {**signing_key("k", "ES256K").jwk, "crv": "P-256", "alg": "ES256"},
        {**EC, "x": EC["y"]},
        {**EC, "crv": ["P-256"]},
        {**ED, "x": "AAAA"},
        {**ED, "crv": "Ed448"},
        {**ED, "crv": "X25519"},
        {},
        [],
        "key",
        None,
    ],
    ids=lambda _key: "",  # its number: keys are fresh in every process
)
def test_an_unusable_key_is_skipped(jwk):
    assert [key.kid for key in keys(jwk, ED)] == ["ed"]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"", "is not JSON"),
        (b"{}", "has no list .keys."),
        (b'{"keys":{}}', "has no list .keys."),
        (b'{"keys":[],"keys":[]}', "has a name twice"),
        (json.dumps({"keys": [{}] * 101}).encode(), "101 keys, more than 100"),
    ],
)
def test_an_invalid_jwk_set_is_refused(document, says):
    with pytest.raises(Unavailable, match=says):
        read_keys(document)


def test_the_key_that_a_token_names_is_chosen():
    two = keys(RSA, signing_key("key-2").jwk, EC)
    assert same(choose(two, "key-1", "RS256"), RSA)
    assert same(choose(two, None, "ES256"), EC)
    assert choose(two, None, "RS256") is None  # either of them
    assert choose(two, "key-1", "ES256") is None
    assert choose(two, "key-3", "RS256") is None
    assert choose(keys(without(RSA, "kid")), "key-1", "RS256") is None
    assert choose(keys(without(RSA, "kid")), None, "RS256")
    assert choose((), None, "RS256") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from([RSA["n"], EC["x"], "sig"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = ["kty", "crv", "kid", "use", "alg", "key_ops", "n", "e", "x", "y", "d"]
WILD = st.builds(
    lambda good, bad: {**good, **bad},
    st.sampled_from([RSA, EC, ED, {}]),
    st.dictionaries(st.sampled_from(MEMBERS), JSON | st.binary(max_size=40).map(b64), max_size=2),
)


@settings(deadline=None)
@given(st.lists(WILD | JSON, max_size=3))
@example([{**RSA, "n": "A" * 2048}])
@example([{**RSA, "e": "_" * 2048}])
@example([{**RSA, "n": b64(b"\xff" * 256)[:-1] + "A", "e": RSA["n"]}])
def test_of_any_published_keys_only_fitting_ones_are_used(jwks):
    for key in keys(*jwks):
        assert key.alg in ALGORITHMS
        assert choose([key], key.kid, key.alg)


@given(
    st.binary(max_size=100)
    | st.dictionaries(st.sampled_from(["issuer", "jwks_uri", "keys"]), JSON | st.just(HTTPS)).map(
        lambda document: json.dumps(document).encode()
    )
)
@example(b'{"issuer":"https://issuer.example","jwks_uri":"https://\\u2100.example"}')
@example(b'{"issuer":"https://issuer.example","jwks_uri":"https://a:b"}')
def test_any_response_is_read_or_named_in_the_error(document):
    for read in (read_keys, lambda it: read_discovery(it, HTTPS)):
        try:
            read(document)
        except Unavailable as refused:
            result = refused.message
        else:
            result = "read"
        assert result


async def test_a_host_that_cannot_be_resolved(issuers):
    for host in ("a..b", "x" * 80 + ".example"):
        with pytest.raises(Unavailable):
            await issuers.key(f"https://{host}", "k", "RS256")


async def test_endless_headers_are_not_read(issuer, issuers):
    async def handler(request):
        return web.Response(headers={f"X-{n}": "x" * 8000 for n in range(100)})

    issuer.answers[JWKS] = handler
    assert "cannot be fetched" in await why(issuers, issuer)
