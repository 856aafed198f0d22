"""JSON Web Tokens: read strictly, and judged by rules of our own; of PyJWT only the signature's arithmetic is used.

Pure: keys and the time are passed in. A refusal is a sentence that never holds the token or its signature. What a
token says of its own keys (`jwk`, `jku`, `x5u`) is never looked at.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK

from bkpool.core.errors import Unauthenticated

ALGORITHMS = ("RS256", "ES256", "EdDSA")
LONGEST = 16_384
"""Characters of a token, as of a whole Authorization header."""
LONGEST_KID = 256
LEEWAY = 30
"""Seconds that the clocks of an issuer and of this machine may differ."""

_TYPES = frozenset({"JWT", "JOSE", "AT+JWT"})
"""`typ`, where it is given (RFC 7519 5.1, RFC 9068 2.1): nothing that the issuer signs for another purpose, such as
`logout+jwt` or `dpop+jwt` (RFC 8725 3.11)."""
_DEEPEST = 16
_LONGEST_INTEGER = 100  # digits: far more than any claim has, and far less than what takes time to convert
_LAST_SECOND = 253_402_300_799  # of the year 9999: what a datetime can hold
_RSA_BITS = range(
    2048, 8193
)  # NIST SP 800-131A; above it, checking a signature would take the issuer's word for long
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Token:
    """A well-formed token. Its claims are worth nothing until the signature is checked."""

    alg: str
    kid: str | None
    claims: Mapping[str, object] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def looks_like_one(bearer: str) -> bool:
    """Whether a bearer token is meant to be a JWT: three segments, of which the first begins as an object in JSON."""
    return bearer.count(".") == 2 and bearer.startswith(("ey", "ew"))  # noqa: PLR2004 - header.claims.signature


def shown(value: object) -> str:
    """A claim's value for a message; cut when it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# --- reading --------------------------------------------------------------------------------------------------------


def parse(text: str) -> Token:
    """The token in this compact form (RFC 7515 7.1), not verified.

    Raises:
        Unauthenticated: It is not well-formed, or is of a kind that is not taken here; the message says which.
    """
    if len(text) > LONGEST:
        raise Unauthenticated(f"the token is longer than {LONGEST} characters")
    segments = text.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - header.claims.signature
        raise Unauthenticated("the token has not three segments")
    alg, kid = _header(_object(segments[0], "header"))
    claims = _object(segments[1], "claims")
    return Token(alg, kid, claims, text.rpartition(".")[0].encode(), _decode(segments[2], "signature"))


def read_object(document: bytes) -> dict[str, object]:
    """A JSON object, taken strictly: UTF-8, no name twice, no number that is none, not nested without end.

    Raises:
        ValueError: It is not one; the message says why and repeats nothing of it.
    """
    try:
        value = json.loads(
            document.decode(),
            object_pairs_hook=_pairs,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is not JSON") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 - callers of a parser expect ValueError
    _check(value, _DEEPEST)
    return value


def _header(header: Mapping[str, object]) -> tuple[str, str | None]:
    alg, kid, typ = header.get("alg"), header.get("kid"), header.get("typ")
    if "crit" in header:
        raise Unauthenticated("the token's header has crit: no extensions are known here")
    if alg not in ALGORITHMS or not isinstance(alg, str):
        raise Unauthenticated(f"the token's alg is {shown(alg)}, not one of {', '.join(ALGORITHMS)}")
    if typ is not None and (not isinstance(typ, str) or typ.upper() not in _TYPES):
        raise Unauthenticated(f"the token's typ is {shown(typ)}: not a token of an identity")
    if kid is not None and (not isinstance(kid, str) or len(kid) > LONGEST_KID):
        raise Unauthenticated(f"the token's kid is not a text of at most {LONGEST_KID} characters")
    return alg, kid


def _decode(segment: str, part: str) -> bytes:
    """Base64url, in the one way to write it: no padding, nothing between, no stray bits at the end."""
    try:
        data = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
        if segment and base64.urlsafe_b64encode(data).rstrip(b"=").decode() == segment:
            return data
    except ValueError:
        pass
    raise Unauthenticated(f"the token's {part} is not base64url")


def _object(segment: str, part: str) -> dict[str, object]:
    try:
        return read_object(_decode(segment, part))
    except ValueError as error:
        raise Unauthenticated(f"the token's {part} {error}") from None


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("has a name twice")
    return found


def _no_number(_text: str) -> object:
    raise ValueError("has a number that is none")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("has a number that is too large")
    return number


def _bounded(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError("has a number that is too large")
    return int(text)


def _check(value: object, levels: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("has half a character") from None  # a lone surrogate, written as \ud800
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError("is nested too deeply")
        for member in value:
            _check(member, levels - 1)
        for member in value.values() if isinstance(value, dict) else ():
            _check(member, levels - 1)


# --- judging --------------------------------------------------------------------------------------------------------


def fits(key: PyJWK, alg: str) -> bool:
    """Whether a key is a public one, of the kind and strength that the algorithm wants."""
    public = key.key
    if key.algorithm_name != alg:
        return False
    if alg == "RS256":
        return isinstance(public, RSAPublicKey) and public.key_size in _RSA_BITS
    if alg == "ES256":
        return isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1)
    return alg == "EdDSA" and isinstance(public, Ed25519PublicKey)


def verify_signature(token: Token, key: PyJWK) -> None:
    """Checks that the holder of this key signed the token.

    Raises:
        Unauthenticated: He did not, or the key is not one for the token's algorithm.
    """
    if not fits(key, token.alg):
        raise Unauthenticated(f"the issuer's key is not one for {token.alg}")
    if not key.Algorithm.verify(token.signed, key.key, token.signature):
        raise Unauthenticated("the token's signature is wrong")


def verify_claims(
    claims: Mapping[str, object], *, issuer: str, audience: str, client_id: str | None, now: datetime
) -> None:
    """Checks who made the token by its own word, for whom, and for when (OIDC Core 3.1.3.7, RFC 7519 4.1).

    Args:
        claims: The token's.
        issuer: What `iss` must be, to the letter.
        audience: What must be among `aud`.
        client_id: What `azp` may be besides the audience.
        now: The time.

    Raises:
        Unauthenticated: One of them is missing or wrong; the message names it.
    """
    if claims.get("iss") != issuer:
        raise Unauthenticated(f"iss is {shown(claims.get('iss'))}, not {shown(issuer)}")
    if not isinstance(claims.get("sub"), str) or not claims["sub"]:
        raise Unauthenticated("sub is missing, or not a text")
    _check_audience(claims, audience, client_id)
    _check_times(claims, now.astimezone(UTC).timestamp())


def _check_audience(claims: Mapping[str, object], audience: str, client_id: str | None) -> None:
    aud, azp = claims.get("aud"), claims.get("azp")
    several = aud if isinstance(aud, list) else [aud]
    if not several or not all(isinstance(one, str) for one in several):
        raise Unauthenticated("aud is missing, or neither a text nor a list of texts")
    if audience not in several:
        raise Unauthenticated(f"aud is {shown(aud)}, not {shown(audience)}")
    if azp is None:
        if len(several) > 1:
            raise Unauthenticated("azp is missing, and there are several audiences")
    elif not isinstance(azp, str) or azp not in {audience, client_id}:
        wanted = shown(audience) if client_id is None else f"{shown(audience)} or {shown(client_id)}"
        raise Unauthenticated(f"azp is {shown(azp)}, not {wanted} (clientID allows another)")


def _check_times(claims: Mapping[str, object], now: float) -> None:
    exp, iat = _time(claims, "exp"), _time(claims, "iat")
    if exp <= now - LEEWAY:
        raise Unauthenticated(f"it expired {now - exp:.0f} s ago")
    if iat > now + LEEWAY:
        raise Unauthenticated(f"iat is {iat - now:.0f} s in the future: compare the clocks of issuer and appliance")
    if "nbf" in claims and (nbf := _time(claims, "nbf")) > now + LEEWAY:
        raise Unauthenticated(f"it is not valid for another {nbf - now:.0f} s (nbf)")


def _time(claims: Mapping[str, object], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LAST_SECOND:
        raise Unauthenticated(f"{name} is missing, or not a number of seconds since 1970")
    return float(value)
