"""Lease tokens and the digests that stand for secrets and identities.

A token is derived, never stored: only its SHA-256 is. Nothing here keeps or logs what it is given.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

TOKEN_KEY_BYTES = 32
"""Length of the key of the HMAC: the output length of SHA-256, as RFC 2104 section 3 advises."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


def derive(key: bytes, worker_uid: str, allocation_id: str) -> str:
    """The token of one allocation of one worker: 43 characters of base64url, unguessable without the key."""
    mac = hmac.digest(key, f"{worker_uid}\0{allocation_id}".encode(), "sha256")
    return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()


def well_formed(token: str) -> bool:
    """Whether this could be one of our tokens at all."""
    return _TOKEN.fullmatch(token) is not None


def digest(token: str) -> str:
    """SHA-256 of a token, in hex: what may be stored and compared."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def owner_digest(identity: str) -> str:
    """What stands for an identity on a cache: short enough for a label, no name in it."""
    return hashlib.sha256(b"owner\0" + identity.encode()).hexdigest()[:40]


def request_key(identity: str, job_id: str) -> str:
    """What stands for (identity, job) in a worker's label: the key of a repeated request."""
    return hashlib.sha256(f"request\0{identity}\0{job_id}".encode()).hexdigest()[:40]
