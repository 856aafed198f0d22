"""The entries of a Secret or a file of fixed bearer tokens: who has which, and what is wrong with the others.

Pure. Tokens are kept as digests only; a fault names an entry by its number, since its key may be the token.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from bkpool.core.auth import RESERVED
from bkpool.identity.claims import LONGEST_NAME, is_name

SHORTEST_TOKEN = 16
"""Characters: 96 bits where they are base64, beyond guessing over a network."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What an Authorization header can carry (RFC 7235, token68). Nothing that is an object looks like it."""


@dataclass(frozen=True, slots=True)
class StaticToken:
    """Who has the token of this digest."""

    digest: bytes
    user: str
    pools: tuple[str, ...] | None = None
    """Patterns of the pools that it is for, where that is said."""


@dataclass(frozen=True, slots=True)
class StaticTokens:
    """What a file or a Secret says."""

    entries: tuple[StaticToken, ...] = ()
    faults: tuple[str, ...] = ()
    """What is wrong with the entries that are left out. No secret is in it."""

    def of(self, bearer: str) -> tuple[StaticToken, ...]:
        """The entries of this token. All are compared, so that the time tells nothing of a digest."""
        asked = _digest(bearer)
        return tuple([entry for entry in self.entries if hmac.compare_digest(entry.digest, asked)])


def parse_static_tokens(data: Mapping[Any, object]) -> StaticTokens:
    """Reads the entries of a Secret or a file; what is wrong with one leaves the others as they are.

    Args:
        data: By key: the token, the key being the user's name; or an object `{user, pools, token}`, itself or as JSON
            or YAML. Without `token` the key is the token, as the older Go controller has it; without `user` the key
            is the user's name.
    """
    entries: list[StaticToken] = []
    faults: list[str] = []
    for number, (key, value) in enumerate(data.items(), 1):
        try:
            entries.append(_entry(key, value))
        except ValueError as error:
            faults.append(f"entry {number} of {len(data)}: {error}")
    return StaticTokens(tuple(entries), tuple(faults))


def _entry(key: object, value: object) -> StaticToken:
    """Raises ValueError, in words that hold neither key nor value."""
    told = _told(value)
    token = told.get("token", key)
    user = told.get("user", key if "token" in told else None)
    pools = told.get("pools")
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        raise ValueError("its token is not one that a request can carry: letters, digits and ._~+/-=")
    if len(token) < SHORTEST_TOKEN:
        raise ValueError(f"its token is shorter than {SHORTEST_TOKEN} characters")
    if pools is not None and not (isinstance(pools, list) and all(isinstance(one, str) for one in pools)):
        raise ValueError("its pools are not a list of names or patterns")
    return StaticToken(_digest(token), _name(user), None if pools is None else tuple(pools))


def _told(value: object) -> dict[str, object]:
    """The object that a value is, or stands for."""
    if isinstance(value, str):
        text = value.strip()
        value = {"token": text} if _TOKEN.fullmatch(text) else parse_document(text)
    if not isinstance(value, dict):
        raise ValueError("it is neither a token in quotes nor an object with user, pools, token")  # noqa: TRY004
    return value


def parse_document(text: str) -> object:
    """What JSON or YAML text stands for; None where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # their messages quote the text
        return None


def _name(user: object) -> str:
    if not isinstance(user, str) or not user:
        raise ValueError("it has no user")
    if not is_name(user):
        raise ValueError(f"its user is not a name of at most {LONGEST_NAME} printable characters")
    if user.startswith(RESERVED):
        raise ValueError(f"its user begins with one of {', '.join(RESERVED)}, which mean others")
    return user


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
