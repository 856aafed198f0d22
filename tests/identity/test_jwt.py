"""Hostile tokens, each with the reason of its refusal, and valid ones that are accepted."""

from __future__ import annotations

import hashlib
import hmac
import json
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st
from jwt import PyJWK
from jwt.algorithms import get_default_algorithms

from bkpool.core.errors import Unauthenticated
from bkpool.identity.jwt import (
    LONGEST,
    fits,
    looks_like_one,
    parse,
    read_object,
    shown,
    verify_claims,
    verify_signature,
)
from support.issuer import AUDIENCE, b64, forge, signing_key

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECONDS = int(NOW.timestamp())
ISSUER = "https://issuer.example"
RSA, EC, ED = signing_key(), signing_key("ec", "ES256"), signing_key("ed", "EdDSA")
HEADER = {"alg": "RS256", "typ": "JWT", "kid": "key-1"}
GOOD = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "iat": SECONDS, "exp": SECONDS + 300}


class _Left(Enum):
    OUT = "left out"


MISSING = _Left.OUT


def public(key) -> PyJWK:
    return PyJWK(key.jwk)


def judge(text: str, key=RSA, audience: str = AUDIENCE, client_id: str | None = None) -> None:
    token = parse(text)
    verify_signature(token, public(key))
    verify_claims(token.claims, issuer=ISSUER, audience=audience, client_id=client_id, now=NOW)


def claims(**changes) -> dict[str, object]:
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not MISSING}


# --- the good ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [RSA, EC, ED], ids=lambda key: key.alg)
def test_a_valid_token_of_each_algorithm_is_accepted(key):
    judge(forge({"alg": key.alg, "kid": key.kid}, GOOD, key), key)


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": SECONDS - 29},
        {"exp": SECONDS + 0.5},
        {"iat": SECONDS + 30},
        {"nbf": SECONDS + 30},
        {"aud": [AUDIENCE]},
        {"aud": [AUDIENCE, "other"], "azp": AUDIENCE},
        {"aud": [AUDIENCE, "other"], "azp": "client"},
        {"azp": "client"},
        {"extra": {"deep": [{"er": None}]}},
    ],
    ids=str,
)
def test_claims_within_the_limits_are_accepted(changes):
    judge(forge(HEADER, claims(**changes), RSA), client_id="client")


@pytest.mark.parametrize("typ", [MISSING, "jwt", "JOSE", "at+jwt"], ids=str)
def test_allowed_types_of_tokens_are_accepted(typ):
    judge(forge({"alg": "RS256"} | ({} if typ is MISSING else {"typ": typ}), GOOD, RSA))


# --- headers --------------------------------------------------------------------------------------------------------

PEM = RSA.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def by_hmac() -> str:
    text = ".".join(b64(json.dumps(part).encode()) for part in ({"alg": "HS256", "kid": "key-1"}, GOOD))
    return f"{text}.{b64(hmac.digest(PEM, text.encode(), hashlib.sha256))}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (by_hmac(), "alg is 'HS256'"),
        (forge({"alg": "none"}, GOOD, None), "alg is 'none'"),
        (forge({"alg": "none"}, GOOD, RSA), "alg is 'none'"),
        (forge({"alg": "nOnE"}, GOOD, None), "alg is 'nOnE'"),
        (forge({"typ": "JWT"}, GOOD, RSA), "alg is None"),
        (forge({"alg": ["RS256"]}, GOOD, RSA), "alg is \\['RS256'\\]"),
        (forge({"alg": "RS512"}, GOOD, RSA), "alg is 'RS512'"),
        (forge({"alg": "PS256"}, GOOD, RSA), "alg is 'PS256'"),
        (forge({**HEADER, "crit": []}, GOOD, RSA), "crit"),
        (forge({**HEADER, "crit": ["b64"], "b64": False}, GOOD, RSA), "crit"),
        (forge({**HEADER, "crit": ["exp"]}, GOOD, RSA), "crit"),
        (forge({**HEADER, "kid": 7}, GOOD, RSA), "kid is not a text"),
        (forge({**HEADER, "kid": "k" * 257}, GOOD, RSA), "kid is not a text of at most 256"),
        (forge({**HEADER, "typ": "logout+jwt"}, GOOD, RSA), "typ is 'logout\\+jwt'"),
        (forge({**HEADER, "typ": ["JWT"]}, GOOD, RSA), "typ is"),
        (forge(b'{"alg":"RS256","alg":"none"}', GOOD, RSA), "header has a name twice"),
        (forge(b'{"alg":"RS256","x":{"a":1,"a":1}}', GOOD, RSA), "header has a name twice"),
        (forge(b'["RS256"]', GOOD, RSA), "header is not a JSON object"),
        (forge(b"{'alg': 'RS256'}", GOOD, RSA), "header is not JSON"),
        (forge(b"\xff\xfe{\x00}\x00", GOOD, RSA), "header is not JSON"),
    ],
    ids=lambda part: part if isinstance(part, str) and len(part) < 80 else "",
)
def test_an_invalid_header_is_refused(text, why):
    with pytest.raises(Unauthenticated, match=why):
        judge(text)


@pytest.mark.parametrize("member", ["jwk", "jku", "x5u", "x5c"])
def test_keys_in_the_token_itself_are_ignored(member):
    other = signing_key("other")
    value = {"jwk": other.jwk, "x5c": ["MII"]}.get(member, "https://evil.example/keys")
    with pytest.raises(Unauthenticated, match="signature is wrong"):
        judge(forge({**HEADER, member: value}, GOOD, other))
    judge(forge({**HEADER, member: value}, GOOD, RSA))


# --- signatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        (forge(HEADER, GOOD, signing_key("other")), RSA, "signature is wrong"),
        (forge({**HEADER, "alg": "ES256"}, GOOD, EC), RSA, "not one for ES256"),
        (forge(HEADER, GOOD, RSA), EC, "not one for RS256"),
        (forge({**HEADER, "alg": "ES256"}, GOOD, signing_key("384", "ES384")), EC, "signature is wrong"),
        (forge({**HEADER, "alg": "ES256"}, GOOD, signing_key("k", "ES256K")), EC, "signature is wrong"),
        (forge({**HEADER, "alg": "ES256"}, GOOD, EC), signing_key("384", "ES384"), "not one for ES256"),
        (forge({**HEADER, "alg": "ES256"}, GOOD, EC), signing_key("k", "ES256K"), "not one for ES256"),
        (forge({**HEADER, "alg": "EdDSA"}, GOOD, signing_key("ed2", "EdDSA")), ED, "signature is wrong"),
        (forge(HEADER, GOOD, signing_key("weak", bits=1024)), signing_key("weak", bits=1024), "not one for RS256"),
        (forge(HEADER, GOOD, RSA)[:-2], RSA, "signature is wrong"),
        (forge(HEADER, GOOD, RSA).rpartition(".")[0] + ".AAAA", RSA, "signature is wrong"),
        (forge({**HEADER, "alg": "ES256"}, GOOD, EC).rpartition(".")[0] + "." + b64(bytes(64)), EC, "is wrong"),
    ],
    ids=[
        "other",
        "EC-as-RSA",
        "RSA-as-EC",
        "384-sig",
        "k1-sig",
        "384-key",
        "k1-key",
        "ed",
        "weak",
        "cut",
        "4",
        "zero",
    ],
)
def test_a_signature_with_another_key_is_refused(text, key, why):
    with pytest.raises(Unauthenticated, match=why):
        judge(text, key)


def test_claims_that_were_changed_after_signing_are_refused():
    header, _, signature = forge(HEADER, GOOD, RSA).split(".")
    with pytest.raises(Unauthenticated, match="signature is wrong"):
        judge(f"{header}.{b64(json.dumps(claims(sub='root')).encode())}.{signature}")


def test_a_private_key_is_not_used_to_verify():
    assert not fits(PyJWK({**RSA.jwk, **json.loads(_private(RSA))}), "RS256")


@pytest.mark.parametrize(
    ("key", "made_for", "alg"),
    [
        (RSA, "RS512", "RS256"),
        (RSA, "PS256", "RS256"),
        (signing_key("384", "ES384"), "ES256", "ES256"),
        (signing_key("k", "ES256K"), "ES256", "ES256"),
        (signing_key("weak", bits=1024), "RS256", "RS256"),
        (ED, "EdDSA", "ES256"),
        (RSA, "RS512", "RS512"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.alg,
)
def test_a_key_of_another_algorithm_is_refused(key, made_for, alg):
    assert not fits(PyJWK(key.jwk, made_for), alg)


def _private(key) -> str:
    return get_default_algorithms()[key.alg].to_jwk(key.private)


# --- claims ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"iss": "https://issuer.example.evil"}, "iss is 'https://issuer.example.evil'"),
        ({"iss": "https://issuer.example/"}, "iss is 'https://issuer.example/'"),
        ({"iss": "https://issuer.exampl"}, "iss is"),
        ({"iss": "HTTPS://issuer.example"}, "iss is"),
        ({"iss": [ISSUER]}, "iss is"),
        ({"iss": MISSING}, "iss is None"),
        ({"aud": "buildkit"}, "aud is 'buildkit', not 'buildkit-controller'"),
        ({"aud": AUDIENCE + "/"}, "aud is"),
        ({"aud": ["a", "b"]}, "aud is"),
        ({"aud": []}, "aud is missing"),
        ({"aud": {AUDIENCE: 1}}, "aud is missing"),
        ({"aud": [AUDIENCE, 7]}, "aud is missing"),
        ({"aud": MISSING}, "aud is missing"),
        ({"aud": [AUDIENCE, "other"]}, "azp is missing"),
        ({"aud": [AUDIENCE, "other"], "azp": "other"}, "azp is 'other', not 'buildkit-controller' or 'client'"),
        ({"azp": "other"}, "azp is 'other'"),
        ({"azp": [AUDIENCE]}, "azp is"),
        ({"sub": MISSING}, "sub is missing"),
        ({"sub": ""}, "sub is missing"),
        ({"sub": 7}, "sub is missing or not a text"),
        ({"exp": SECONDS - 30}, "expired 30 s ago"),
        ({"exp": 0}, "expired"),
        ({"exp": MISSING}, "exp is missing"),
        ({"exp": str(SECONDS + 300)}, "exp is missing, or not a number"),
        ({"exp": True}, "exp is missing, or not a number"),
        ({"exp": 10**90}, "exp is missing, or not a number of seconds"),
        ({"exp": 1e300}, "exp is missing, or not a number of seconds"),
        ({"exp": -(10**90)}, "exp is missing"),
        ({"iat": MISSING}, "iat is missing"),
        ({"iat": SECONDS + 31}, "iat is 31 s in the future"),
        ({"iat": True}, "iat is missing"),
        ({"nbf": SECONDS + 31}, "not valid for another 31 s"),
        ({"nbf": "now"}, "nbf is missing, or not"),
        ({"nbf": None}, "nbf is missing, or not"),
    ],
    ids=str,
)
def test_invalid_claims_are_refused(changes, why):
    with pytest.raises(Unauthenticated, match=why):
        judge(forge(HEADER, claims(**changes), RSA), client_id="client")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (b'{"sub":"ann","sub":"root"}', "payload has a name twice"),
        (b'{"a":[{"b":{"c":1,"c":1}}]}', "payload has a name twice"),
        (b'{"exp":NaN}', "NaN or infinity"),
        (b'{"exp":-Infinity}', "NaN or infinity"),
        (b'{"exp":1e999}', "too large"),
        (b'{"exp":' + b"9" * 5000 + b"}", "too large"),
        (b'{"a":' + b"[" * 16 + b"]" * 16 + b"}", "nested too deeply"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"a":' * 2000, "not JSON|too deeply"),
        (b'{"sub":"\\ud800"}', "an incomplete character"),
        (b'{"\\udfff":1}', "an incomplete character"),
        (b'{"sub":"\xff"}', "not JSON"),
        (b'\xef\xbb\xbf{"sub":"ann"}', "not JSON"),
        (b"null", "not a JSON object"),
        (b"{} {}", "not JSON"),
    ],
    ids=lambda it: it[:30] if isinstance(it, bytes) else "",
)
def test_a_malformed_payload_is_refused(document, why):
    with pytest.raises(Unauthenticated, match=why):
        judge(forge(HEADER, document, RSA))


# --- form -----------------------------------------------------------------------------------------------------------

TOKEN = forge(HEADER, GOOD, RSA)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "three segments"),
        ("ey.a", "three segments"),
        (TOKEN + ".more", "three segments"),
        (TOKEN + ".a.b", "three segments"),  # five: JWE
        (TOKEN + "=", "signature is not base64url"),
        (TOKEN.rpartition(".")[0] + ".", "signature is not base64url"),
        (TOKEN.replace(".", ".\n", 1), "payload is not base64url"),
        (TOKEN.replace(".", ". ", 1), "payload is not base64url"),
        (TOKEN.replace(".", ".+/", 1), "payload is not base64url"),
        ("é" + TOKEN, "header is not base64url"),
        ("\ud800" + TOKEN, "header is not base64url"),
        ("..", "header is not base64url"),
        ("ey" + "A" * LONGEST + ".e30.AAAA", "longer than 16384"),
        ("ey" + "A" * 1_000_000 + ".e30.AAAA", "longer than 16384"),
    ],
    ids=lambda it: it[:12].encode(errors="replace"),
)
def test_a_malformed_token_is_refused(text, why):
    with pytest.raises(Unauthenticated, match=why):
        parse(text)


def test_extra_bits_at_the_end_of_a_segment_are_refused():
    """Base64url of one byte has four unused bits; they must be zero."""
    assert TOKEN.endswith(tuple("AQgw"))  # 256 bytes: the last letter holds two bits
    with pytest.raises(Unauthenticated, match="signature is not base64url"):
        parse(TOKEN[:-1] + chr(ord(TOKEN[-1]) + 1))


@pytest.mark.parametrize("text", [TOKEN, "ey.a.b", "ewo.a.b"])
def test_what_looks_like_a_jwt(text):
    assert looks_like_one(text)


@pytest.mark.parametrize("text", ["", "k" * 43, "a.b.c", "ey.b", "ey.b.c.d", "ey"])
def test_what_does_not_look_like_a_jwt(text):
    assert not looks_like_one(text)


def test_no_message_and_no_repr_contains_the_token():
    token = parse(TOKEN)
    for secret in (TOKEN.split(".")[2], TOKEN.split(".")[1], "ann"):
        assert secret not in repr(token)
    assert len(shown("x" * 1000)) == 80


# --- whatever else --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
CLAIMS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("iss", "aud", "sub", "exp", "iat", "nbf", "azp"), JSON) | {"extra": JSON}
)


def refusal(judging, *arguments, **named) -> str:
    """The reason of a refusal; empty if accepted. Any other error fails the test."""
    try:
        judging(*arguments, **named)
    except Unauthenticated as refused:
        return refused.message
    return ""


@given(st.text(max_size=300) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}"))
@example("\x00.\x00.\x00")
def test_any_text_is_a_token_or_a_refusal(text):
    assert "\n" not in refusal(parse, text)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_a_refusal(document):
    with suppress(ValueError):
        assert isinstance(read_object(document), dict)


@given(CLAIMS, st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), JSON))
def test_any_signed_claims_and_headers_are_accepted_or_refused(changes, header):
    assert "\n" not in refusal(judge, forge({**HEADER, **header}, {**GOOD, **changes}, ED), ED)


@given(CLAIMS)
@example({"exp": 2**1030})
@example({"aud": [AUDIENCE, []], "azp": {}})
def test_any_claims_are_accepted_or_refused(changes):
    whole = {**GOOD, **changes}
    assert "\n" not in refusal(verify_claims, whole, issuer=ISSUER, audience=AUDIENCE, client_id=None, now=NOW)
