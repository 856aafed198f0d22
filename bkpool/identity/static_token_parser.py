"""Parses a Secret or a file of static bearer tokens: the users of the valid entries, and the faults of the others.

Pure. Only digests of tokens are kept. A fault names an entry by its number, because its key may be the token.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from bkpool.core import tokens
from bkpool.core.auth import RESERVED_PREFIXES
from bkpool.identity.claims import LONGEST_NAME, is_name

SHORTEST_TOKEN = 16
"""Characters. In base64 these are 96 bits, too many to guess over a network."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What an Authorization header can contain (RFC 7235, token68). No object in JSON or YAML matches it."""


@dataclass(frozen=True, slots=True)
class StaticToken:
    """One valid entry: the user of the token with this digest."""

    digest: str
    user: str
    pools: tuple[str, ...] | None = None
    """Patterns of the pools that it is valid for; None: no restriction."""


@dataclass(frozen=True, slots=True)
class StaticTokens:
    """The contents of a file or a Secret."""

    entries: tuple[StaticToken, ...] = ()
    faults: tuple[str, ...] = ()
    """What is wrong with the entries that are left out, without any secret."""

    def of(self, bearer: str) -> tuple[StaticToken, ...]:
        """The entries of this token. Every entry is compared, so that the time reveals nothing about a digest."""
        digest = tokens.digest(bearer)
        return tuple([entry for entry in self.entries if hmac.compare_digest(entry.digest, digest)])


def parse_static_tokens(data: Mapping[Any, object]) -> StaticTokens:
    """Parses the entries of a Secret or a file. A fault in one entry does not affect the others.

    Args:
        data: The entries by key. An entry is the token (and its key is the user's name), or an object
            `{user, pools, token}`, as such or as text in JSON or YAML. Without `token`, the key is the token, as in
            the older Go controller; without `user`, the key is the user's name.
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
    """Parses one entry. Raises ValueError, whose message contains neither key nor value."""
    fields = _fields(value)
    token = fields.get("token", key)
    user = fields.get("user", key if "token" in fields else None)
    pools = fields.get("pools")
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        raise ValueError("its token has a character other than letters, digits and ._~+/-=")
    if len(token) < SHORTEST_TOKEN:
        raise ValueError(f"its token is shorter than {SHORTEST_TOKEN} characters")
    if pools is not None and not (isinstance(pools, list) and all(isinstance(one, str) for one in pools)):
        raise ValueError("its `pools` is not a list of names or patterns")
    return StaticToken(tokens.digest(token), _name(user), None if pools is None else tuple(pools))


def _fields(value: object) -> dict[str, object]:
    """The fields of an entry, which is an object or a text that contains one."""
    if isinstance(value, str):
        text = value.strip()
        value = {"token": text} if _TOKEN.fullmatch(text) else parse_document(text)
    if not isinstance(value, dict):
        raise ValueError("it is neither a token in quotes nor an object with user, pools, token")  # noqa: TRY004
    return value


def parse_document(text: str) -> object:
    """Parses a text in JSON or YAML; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # not re-raised: their messages quote the text
        return None


def _name(user: object) -> str:
    if not isinstance(user, str) or not user:
        raise ValueError("it has no `user`")
    if not is_name(user):
        raise ValueError(f"its `user` is not a name of at most {LONGEST_NAME} printable characters")
    if user.startswith(RESERVED_PREFIXES):
        raise ValueError(f"its `user` begins with {', '.join(RESERVED_PREFIXES)}, which are reserved")
    return user
