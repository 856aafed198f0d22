"""Lease tokens, and the digests that are stored in place of secrets and identities.

A token is derived and never stored; only its SHA-256 is. Nothing here keeps or logs a token.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

TOKEN_KEY_BYTES = 32
"""Length of the key of the HMAC: the output length of SHA-256, as RFC 2104 section 3 advises."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


def derive(key: bytes, worker_uid: str, lease_id: str) -> str:
    """The token of one lease of one worker: 43 characters of base64url, which nobody can guess without the key."""
    mac = hmac.digest(key, f"{worker_uid}\0{lease_id}".encode(), "sha256")
    return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()


def well_formed(token: str) -> bool:
    """Whether this has the form of a lease token."""
    return _TOKEN.fullmatch(token) is not None


def digest(token: str) -> str:
    """SHA-256 of a token in hex, which may be stored and compared."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def owner_digest(identity: str) -> str:
    """The digest of an identity that marks a cache. It fits into a label, and the name cannot be read from it."""
    return hashlib.sha256(b"owner\0" + identity.encode()).hexdigest()[:40]


def request_key(identity: str, job_id: str) -> str:
    """The digest of (identity, job) in a worker's label, by which a repeated request finds its lease."""
    return hashlib.sha256(f"request\0{identity}\0{job_id}".encode()).hexdigest()[:40]
