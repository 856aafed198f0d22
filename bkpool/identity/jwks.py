"""Reads, strictly, what an issuer publishes: its discovery document and its keys.

Pure; issuer_keys.py fetches the documents. Keys for other purposes or algorithms are skipped, since issuers publish
such keys, too. A document that is not as specified is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jwt import PyJWK, PyJWTError

from bkpool.core.auth import check_url
from bkpool.core.errors import Unavailable
from bkpool.identity.jwt import LONGEST_KID, fits, read_object, shown

_MOST_KEYS = 100  # Google has 2, GitHub 4, Microsoft about 10
_LONGEST_MEMBER = 2048  # characters: an RSA modulus of 8192 bits has 1366
_KINDS = {
    ("RSA", None): ("RS256", ("n", "e")),
    ("EC", "P-256"): ("ES256", ("crv", "x", "y")),
    ("OKP", "Ed25519"): ("EdDSA", ("crv", "x")),
}
"""Algorithm and public members by kty and crv (RFC 7518 6, RFC 8037 2)."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that an issuer may sign with."""

    kid: str | None
    alg: str
    key: PyJWK


def read_discovery(document: bytes, issuer: str) -> str:
    """The URL of the keys, from an issuer's discovery document (OIDC Discovery 4.2, 4.3).

    Raises:
        Unavailable: The document is of another issuer, or not usable; the message says why.
    """
    try:
        found = read_object(document)
    except ValueError as error:
        raise Unavailable(f"its discovery document {error}") from None
    if found.get("issuer") != issuer:
        raise Unavailable(f"its discovery document is of the issuer {shown(found.get('issuer'))}")
    url = found.get("jwks_uri")
    if not isinstance(url, str):
        raise Unavailable("its discovery document has no jwks_uri")
    try:
        check_url(url)
    except ValueError as error:
        raise Unavailable(f"jwks_uri in its discovery document {error}") from None
    if not url.startswith("https://") and not issuer.startswith("http://"):
        raise Unavailable("jwks_uri in its discovery document does not begin with https://")
    return url


def read_keys(document: bytes) -> tuple[PublicKey, ...]:
    """The usable keys of a JWK set (RFC 7517 5); there may be none.

    Raises:
        Unavailable: It is not a JWK set, or has too many keys.
    """
    try:
        keys = read_object(document).get("keys")
    except ValueError as error:
        raise Unavailable(f"its JWK set {error}") from None
    if not isinstance(keys, list):
        raise Unavailable("its JWK set has no list `keys`")
    if len(keys) > _MOST_KEYS:
        raise Unavailable(f"its JWK set has {len(keys)} keys, more than {_MOST_KEYS}")
    return tuple(key for key in map(_usable, keys) if key is not None)


def choose(keys: Sequence[PublicKey], kid: str | None, alg: str) -> PyJWK | None:
    """The key that a token names. If it names none: the key for its algorithm, if there is only one."""
    fitting = [one.key for one in keys if one.alg == alg and kid in {None, one.kid}]
    return fitting[0] if len(fitting) == 1 or (fitting and kid is not None) else None


def _usable(jwk: object) -> PublicKey | None:
    if (
        not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig" or "d" in jwk
    ):  # d: a private key, which everybody could read
        return None
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    kty, crv, kid = jwk.get("kty"), jwk.get("crv"), jwk.get("kid")
    kind = next((it for it in _KINDS if it == (kty, None if kty == "RSA" else crv)), None)
    if kind is None or not (kid is None or (isinstance(kid, str) and len(kid) <= LONGEST_KID)):
        return None
    alg, names = _KINDS[kind]
    members = {name: jwk[name] for name in names if isinstance(jwk.get(name), str)}
    if (
        jwk.get("alg", alg) != alg
        or len(members) < len(names)
        or any(len(m) > _LONGEST_MEMBER for m in members.values())
    ):
        return None
    try:
        key = PyJWK({"kty": kty, **members}, algorithm=alg)
    except (PyJWTError, ValueError):
        return None
    return PublicKey(kid, alg, key) if fits(key, alg) else None
