"""The kinds of values that a setting can have, and how each is written as text and in TOML.

It knows no setting. It reads and writes no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv6Address
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from bkpool.core import durations
from bkpool.core.allowances import Allowed, parse_host, parse_image
from bkpool.core.errors import InvalidInput
from bkpool.core.names import Key, check_name
from bkpool.core.urls import canonical

Toml = str | int | bool | list[str]
"""What stands for a value in a TOML file."""

HIGHEST_PORT = 65535
_YES, _NO = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
_PLAIN_HOST = re.compile(r"[^\s\[\]:/]+")  # a name or an IPv4 address
_MILLISECOND = timedelta(milliseconds=1)


class Address(NamedTuple):
    """Where a server listens. Port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ValueKind:
    """One kind of value.

    Attributes:
        name: What a value is called, with its article ("a duration").
        metavar: What stands for a value in `--help`.
        example: A value as a user writes it.
        from_text: Text of an option or an environment variable to what TOML has. Raises ValueError.
        read: What TOML has to the value; relative paths start at the directory. Raises ValueError with the reason.
        write: The value to what TOML has.
        repeated: Whether the option may be given several times.
    """

    name: str
    metavar: str
    example: str
    from_text: Callable[[str], Toml]
    read: Callable[[Toml, Path], Any]
    write: Callable[[Any], Toml]
    repeated: bool = False


def _text(given: Toml, _directory: Path) -> str:
    if not isinstance(given, str):
        raise ValueError("is not text in quotes")  # noqa: TRY004 - callers of `read` expect ValueError
    if not given or not given.isprintable():
        raise ValueError("is empty" if not given else "has characters that cannot be printed")
    return given


def _duration(given: Toml, directory: Path) -> timedelta:
    text = _text(given, directory)
    try:
        value = durations.parse(text)
    except InvalidInput:
        raise ValueError("is not a duration") from None
    if value % _MILLISECOND:
        raise ValueError("is not a whole number of milliseconds")
    return value


def _count(given: Toml, _directory: Path) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise ValueError("is not a whole number")  # noqa: TRY004 - as above
    return given


def _switch(given: Toml, _directory: Path) -> bool:
    if not isinstance(given, bool):
        raise ValueError("is neither true nor false")  # noqa: TRY004 - as above
    return given


def _switch_text(text: str) -> bool:
    if text.lower() in _YES | _NO:
        return text.lower() in _YES
    raise ValueError("is neither true nor false")


def _count_text(text: str) -> int:
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise ValueError("is not a whole number")
    return int(text)


def _address(given: Toml, directory: Path) -> Address:
    host, _, port = _text(given, directory).rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = _is_ipv6(host[1:-1]) if bracketed else _PLAIN_HOST.fullmatch(host) is not None
    if not plain or re.fullmatch("[0-9]{1,5}", port) is None or int(port) > HIGHEST_PORT:
        raise ValueError("is not of the form HOST:PORT")
    return Address(host[1:-1] if bracketed else host, int(port))


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _file(given: Toml, directory: Path) -> Path:
    return directory / _text(given, directory)


def _name(given: Toml, directory: Path) -> str:
    text = _text(given, directory)
    try:
        return check_name(text, field="name")
    except InvalidInput:
        raise ValueError("is not a valid name") from None


def _url(given: Toml, directory: Path) -> str:
    return canonical(_text(given, directory))


def _pool(given: Toml, directory: Path) -> Key:
    namespace, slash, name = _text(given, directory).partition("/")
    if not slash or not namespace or not name or "/" in name:
        raise ValueError("is not of the form NAMESPACE/NAME")
    return Key(_name(namespace, directory), _name(name, directory))


def _list_of(one: Callable[[Toml, Path], Any]) -> Callable[[Toml, Path], tuple[Any, ...]]:
    def read(given: Toml, directory: Path) -> tuple[Any, ...]:
        if not isinstance(given, list):
            raise ValueError("is not a list")  # noqa: TRY004 - as above
        try:
            return tuple(one(item, directory) for item in given)
        except ValueError as error:
            raise ValueError(f"has an item that {error}") from None

    return read


def _allowed(parse: Callable[[str], Allowed]) -> Callable[[Toml, Path], Allowed]:
    return lambda given, directory: parse(_text(given, directory))


def _listed(value: tuple[object, ...]) -> Toml:
    return [str(item) for item in value]


def _roles(given: Toml, directory: Path) -> frozenset[str]:
    roles = frozenset(_list_of(_text)(given, directory))
    if not roles or not roles <= {"api", "controller", "gateway"}:
        raise ValueError("is not a list of roles")
    return roles


class Size(NamedTuple):
    """What buildkitd reads as a size: bytes, or a share of the disk."""

    amount: float
    """Bytes or per cent."""
    is_share: bool


_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([kKMGTP])i?B?|B)|([0-9]{1,3}) ?%")
_SMALLEST, _LARGEST = 2**20, 2**50


def parse_size(text: str) -> Size:
    """Reads a size as buildkitd does, for which 1kB is 1024 bytes (go-units, RAMInBytes). Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("is not a size with a unit")
    number, prefix, share = match.groups()
    if share is not None:
        return Size(int(share), is_share=True)
    return Size(float(number) * 1024 ** " KMGTP".index((prefix or " ").upper()), is_share=False)


def _size(given: Toml, directory: Path) -> str:
    text = _text(given, directory)
    amount, is_share = parse_size(text)
    if not (1 <= amount <= 100 if is_share else _SMALLEST <= amount <= _LARGEST):  # noqa: PLR2004 - per cent
        raise ValueError("is out of bounds")
    return text.replace(" ", "")


def _split(text: str) -> Toml:
    if text.startswith("[") and text.endswith("]"):
        raise ValueError("is in brackets, which only a list in config.toml has")
    return text.split(",")


DURATION = ValueKind("a duration", "DURATION", "1h30m", str, _duration, durations.render)
COUNT = ValueKind("a whole number", "NUMBER", "100", _count_text, _count, int)
SWITCH = ValueKind("true or false", "", "true", _switch_text, _switch, bool)
ADDRESS = ValueKind(
    "HOST:PORT", "HOST:PORT", "127.0.0.1:8082 or [::1]:8082; port 0 takes a free one", str, _address, str
)
TEXT = ValueKind("a text", "TEXT", "my-name", str, _text, str)
NAME = ValueKind("a name of lower-case letters, digits and '-'", "NAME", "team-a", str, _name, str)
URL = ValueKind("a URL of the form https://host:port", "URL", "https://builds.example.com:8082", str, _url, str)
FILE = ValueKind("the name of a file", "FILE", "/etc/bkpool/api.crt", str, _file, str)
POOL = ValueKind("NAMESPACE/NAME", "NAMESPACE/NAME", "default/my-pool", str, _pool, str)
TEXTS = ValueKind("a list of texts", "NAME", "one,two", _split, _list_of(_text), _listed, repeated=True)
NAMES = ValueKind(
    "a list of names of lower-case letters, digits and '-'",
    "NAMESPACE",
    "team-a,team-b",
    _split,
    _list_of(_name),
    _listed,
    repeated=True,
)
ALLOWED_HOSTS = ValueKind(
    "a list of NAMESPACE=NAME",
    "NAMESPACE=NAME",
    "team-a=build.example.com",
    _split,
    _list_of(_allowed(parse_host)),
    _listed,
    repeated=True,
)
ALLOWED_IMAGES = ValueKind(
    "a list of NAMESPACE=PATTERN",
    "NAMESPACE=PATTERN",
    "team-a=registry.example.com/*",
    _split,
    _list_of(_allowed(parse_image)),
    _listed,
    repeated=True,
)
FILES = ValueKind("a list of files", "FILE", "/tmp/image.tar", _split, _list_of(_file), _listed, repeated=True)  # noqa: S108 - an example
SIZE = ValueKind("a size from 1MB to 1PB, or a share of the disk from 1% to 100%", "SIZE", "10GB", str, _size, str)
ROLES = ValueKind("a list of roles", "LIST", "api,controller or gateway", _split, _roles, sorted)

Duration = Annotated[timedelta, DURATION]
Count = Annotated[int, COUNT]
DiskSize = Annotated[str, SIZE]
Switch = Annotated[bool, SWITCH]
Listen = Annotated[Address, ADDRESS]
ListenOrDefault = Annotated[Address | None, ADDRESS]
Text = Annotated[str, TEXT]
OptionalText = Annotated[str | None, TEXT]
OptionalUrl = Annotated[str | None, URL]
Name = Annotated[str, NAME]
OptionalFile = Annotated[Path | None, FILE]
OptionalPool = Annotated[Key | None, POOL]
Texts = Annotated[tuple[str, ...], TEXTS]
Names = Annotated[tuple[str, ...], NAMES]
AllowedHosts = Annotated[tuple[Allowed, ...], ALLOWED_HOSTS]
AllowedImages = Annotated[tuple[Allowed, ...], ALLOWED_IMAGES]
Files = Annotated[tuple[Path, ...], FILES]
