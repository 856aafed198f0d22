"""Parses JSON Web Tokens strictly and verifies them. PyJWT is used only for the arithmetic of signatures.

Pure: keys and the time are passed in. The message of a refusal never contains the token or its signature. Keys that a
token itself brings or names (`jwk`, `jku`, `x5u`) are never used.
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
"""Characters of a token; the limit of an Authorization header is the same."""
LONGEST_KID = 256
LEEWAY = 30
"""Seconds that the clocks of an issuer and of this machine may differ."""

_TYPES = frozenset({"JWT", "JOSE", "AT+JWT"})
"""The allowed values of `typ` (RFC 7519 5.1, RFC 9068 2.1). They exclude what an issuer signs for other purposes,
such as `logout+jwt` or `dpop+jwt` (RFC 8725 3.11)."""
_DEEPEST = 16
_LONGEST_INTEGER = 100  # digits: far more than any claim has, and few enough to be converted quickly
_LAST_SECOND = 253_402_300_799  # of the year 9999, the last of a datetime
_RSA_BITS = range(2048, 8193)
"""The minimum is that of NIST SP 800-131A; above the maximum, checking a signature would take long."""
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Token:
    """A well-formed token. Its claims must not be trusted before its signature is verified."""

    alg: str
    kid: str | None
    claims: Mapping[str, object] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def looks_like_one(bearer: str) -> bool:
    """Whether a bearer token looks like a JWT: three segments, and the first begins like a JSON object in base64."""
    return bearer.count(".") == 2 and bearer.startswith(("ey", "ew"))  # noqa: PLR2004 - header.claims.signature


def shown(value: object) -> str:
    """A claim's value for a message; cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# --- parsing --------------------------------------------------------------------------------------------------------


def parse(text: str) -> Token:
    """Parses a token in compact form (RFC 7515 7.1). Verifies nothing.

    Raises:
        Unauthenticated: It is malformed, or of a kind that is not accepted; the message says why.
    """
    if len(text) > LONGEST:
        raise Unauthenticated(f"the token is longer than {LONGEST} characters")
    segments = text.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - header.claims.signature
        raise Unauthenticated("the token does not have three segments")
    alg, kid = _header(_object(segments[0], "header"))
    claims = _object(segments[1], "payload")
    return Token(alg, kid, claims, text.rpartition(".")[0].encode(), _decode(segments[2], "signature"))


def read_object(document: bytes) -> dict[str, object]:
    """Parses a JSON object strictly: UTF-8, no name twice, no NaN or infinity, limited nesting.

    Raises:
        ValueError: It is not valid; the message says why, and quotes nothing of it.
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
        raise Unauthenticated("the token's header has crit, and bkpool supports no extensions")
    if alg not in ALGORITHMS or not isinstance(alg, str):
        raise Unauthenticated(f"the token's alg is {shown(alg)}, not one of {', '.join(ALGORITHMS)}")
    if typ is not None and (not isinstance(typ, str) or typ.upper() not in _TYPES):
        raise Unauthenticated(f"the token's typ is {shown(typ)}: it is not an ID token")
    if kid is not None and (not isinstance(kid, str) or len(kid) > LONGEST_KID):
        raise Unauthenticated(f"the token's kid is not a text of at most {LONGEST_KID} characters")
    return alg, kid


def _decode(segment: str, part: str) -> bytes:
    """Decodes base64url, only in its canonical form: no padding, no other characters, no extra bits at the end."""
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
    raise ValueError("has NaN or infinity, which are not JSON")


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
            raise ValueError("has an incomplete character") from None  # a lone surrogate, written as \ud800
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError("is nested too deeply")
        for member in value:
            _check(member, levels - 1)
        for member in value.values() if isinstance(value, dict) else ():
            _check(member, levels - 1)


# --- verifying ------------------------------------------------------------------------------------------------------


def fits(key: PyJWK, alg: str) -> bool:
    """Whether a key is public, and has the type and strength that the algorithm requires."""
    public = key.key
    if key.algorithm_name != alg:
        return False
    if alg == "RS256":
        return isinstance(public, RSAPublicKey) and public.key_size in _RSA_BITS
    if alg == "ES256":
        return isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1)
    return alg == "EdDSA" and isinstance(public, Ed25519PublicKey)


def verify_signature(token: Token, key: PyJWK) -> None:
    """Checks that the token was signed with this key.

    Raises:
        Unauthenticated: It was not, or the key is not one for the token's algorithm.
    """
    if not fits(key, token.alg):
        raise Unauthenticated(f"the issuer's key is not one for {token.alg}")
    if not key.Algorithm.verify(token.signed, key.key, token.signature):
        raise Unauthenticated("the token's signature is wrong")


def verify_claims(
    claims: Mapping[str, object],
    *,
    issuer: str,
    audience: str,
    client_id: str | None,
    now: datetime,
    leeway: float = LEEWAY,
) -> None:
    """Checks the issuer, the audience and the times in the token (OIDC Core 3.1.3.7, RFC 7519 4.1).

    Args:
        claims: The claims of the token.
        issuer: The exact value that `iss` must have.
        audience: The value that must be in `aud`.
        client_id: A value that `azp` may have besides the audience.
        now: The current time.
        leeway: Seconds by which the issuer's clock may differ from it.

    Raises:
        Unauthenticated: One of them is missing or wrong; the message names it.
    """
    if claims.get("iss") != issuer:
        raise Unauthenticated(f"iss is {shown(claims.get('iss'))}, not {shown(issuer)}")
    if not isinstance(claims.get("sub"), str) or not claims["sub"]:
        raise Unauthenticated("sub is missing or not a text")
    verify_audience(claims, audience, client_id)
    _check_times(claims, now.astimezone(UTC).timestamp(), leeway)


def verify_audience(claims: Mapping[str, object], audience: str, client_id: str | None) -> None:
    """Checks that the token is for this audience; see `verify_claims`. Raises Unauthenticated."""
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
        raise Unauthenticated(f"azp is {shown(azp)}, not {wanted} (set clientID to allow another)")


def _check_times(claims: Mapping[str, object], now: float, leeway: float) -> None:
    exp, iat = _time(claims, "exp"), _time(claims, "iat")
    if exp <= now - leeway:
        raise Unauthenticated(f"it expired {now - exp:.0f} s ago")
    if iat > now + leeway:
        raise Unauthenticated(f"iat is {iat - now:.0f} s in the future: compare the clocks of issuer and appliance")
    if "nbf" in claims and (nbf := _time(claims, "nbf")) > now + leeway:
        raise Unauthenticated(f"it is not valid for another {nbf - now:.0f} s (nbf)")


def _time(claims: Mapping[str, object], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LAST_SECOND:
        raise Unauthenticated(f"{name} is missing, or not a number of seconds since 1970")
    return float(value)
