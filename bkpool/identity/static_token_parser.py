"""Parses a Secret or a file of static bearer tokens: the users of the valid entries, and the faults of the others.

Pure. Only digests of tokens are kept. A fault names an entry by its number, because its key may be the token. The
author of a Secret may be hostile, so YAML has no aliases here, and its size has a limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bkpool.core import tokens
from bkpool.core.auth import RESERVED_PREFIXES
from bkpool.core.yaml_text import NOT_YAML, UnreadableYaml, load_plain
from bkpool.identity.claims import LONGEST_NAME, is_name

SHORTEST_TOKEN = 16
"""Characters. In base64 these are 96 bits, too many to guess over a network."""

MAX_BYTES = 1 << 20
"""Of a file. The same limit as that of a Secret (Kubernetes documentation, "Secrets")."""
LONGEST_YAML = 4096
"""Characters of one entry in YAML. One in JSON may be as long as its Secret, because it is read much faster."""
MOST_YAML = 32_768
"""Characters of all entries of a Secret in YAML. Reading them takes less than half a second."""

_NEITHER = "it is neither a token in quotes nor an object with user, pools, token"
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
    _by_digest: dict[str, list[StaticToken]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Sorts the entries by digest, so that a caller costs the same however many entries there are."""
        for entry in self.entries:
            self._by_digest.setdefault(entry.digest, []).append(entry)

    def of(self, bearer: str) -> tuple[StaticToken, ...]:
        """The entries of this token. They are found by its SHA-256, whose parts reveal nothing about a token."""
        return tuple(self._by_digest.get(tokens.digest(bearer), ()))


def parse_static_tokens(data: Mapping[Any, object]) -> StaticTokens:
    """Parses the entries of a Secret or a file. A fault in one entry does not affect the others.

    Args:
        data: The entries by key. An entry is the token (and its key is the user's name), or an object
            `{user, pools, token}`, as such or as text in JSON or YAML. Without `token`, the key is the token, as in
            the older Go controller; without `user`, the key is the user's name.
    """
    entries: list[StaticToken] = []
    faults: list[str] = []
    texts = _EntryTexts()
    for number, (key, value) in enumerate(data.items(), 1):
        entry = f"entry {number} of {len(data)}"
        try:
            entries.append(_entry(key, texts.fields(value)))
        except UnreadableYaml as error:
            faults.append(f"{entry}{error.where}: {error.problem}")
        except ValueError as error:
            faults.append(f"{entry}: {error}")
    return StaticTokens(tuple(entries), tuple(faults))


def _entry(key: object, fields: Mapping[str, object]) -> StaticToken:
    """Parses one entry. Raises ValueError, whose message contains neither key nor value."""
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


class _EntryTexts:
    """Reads the entries of one Secret or file. It limits how much YAML is read for all of them together."""

    def __init__(self) -> None:
        self._yaml_left = MOST_YAML

    def fields(self, value: object) -> dict[str, object]:
        """The fields of an entry, which is an object or a text that contains one. Raises ValueError."""
        if isinstance(value, str):
            text = value.strip()
            value = {"token": text} if _TOKEN.fullmatch(text) else _in_json(text) or self._in_yaml(text)
        if not isinstance(value, dict):
            raise ValueError(_NEITHER)  # noqa: TRY004
        return value

    def _in_yaml(self, text: str) -> object:
        if len(text) > LONGEST_YAML:
            raise ValueError(f"it has more than {LONGEST_YAML} characters in YAML: write it in JSON")
        self._yaml_left -= len(text)
        if self._yaml_left < 0:
            raise ValueError(f"all entries in YAML have more than {MOST_YAML} characters: write them in JSON")
        try:
            return load_plain(text, longest=LONGEST_YAML)
        except UnreadableYaml as error:
            if error.problem == NOT_YAML:
                raise ValueError(_NEITHER) from None
            raise


def parse_document(text: str) -> object:
    """Parses a token file in JSON or YAML.

    Raises:
        UnreadableYaml: It is neither, or has an alias, a merge key or too many nodes. The error quotes nothing of it.
    """
    found = _in_json(text)
    return load_plain(text, longest=MAX_BYTES) if found is None else found


def _in_json(text: str) -> object:
    """The value of a text in JSON; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _name(user: object) -> str:
    if not isinstance(user, str) or not user:
        raise ValueError("it has no `user`")
    if not is_name(user):
        raise ValueError(f"its `user` is not a name of at most {LONGEST_NAME} printable characters")
    if user.startswith(RESERVED_PREFIXES):
        raise ValueError(f"its `user` begins with {', '.join(RESERVED_PREFIXES)}, which are reserved")
    return user
