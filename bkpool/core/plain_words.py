"""What is wrong with a value, in plain words: the library that checks values speaks of strings, models and patterns.

Pure. It reads no value, so a message from here never has a secret in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bkpool.core import durations

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SIZE = r"^\d+(\.\d+)?\s?([kKMGTP]i?B?|B|%)$"
LOG_SIZE = r"^(\d+(\.\d+)?\s?([kKMG]i?B?|B)|unlimited)$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?([eE][0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
HOST = r"^[A-Za-z0-9:]([A-Za-z0-9.:-]*[A-Za-z0-9])?$"
BEARER = r"^[A-Za-z0-9._~+/-]+=*$"

PATTERNS: Mapping[str, str] = {
    SIZE: "must be a size such as 10GB, or a share of the disk such as 20%",
    LOG_SIZE: "must be a size such as 10MB, or unlimited",
    QUANTITY: "must be an amount as in Kubernetes, such as 500m, 2 or 4Gi",
    HOST: "must be a DNS name or an IP address",
    BEARER: "has characters that a bearer token cannot have",
}
"""Every pattern of a field to what it means."""

_TIMEDELTA = re.compile("(days|seconds|microseconds)=(-?[0-9]+)")
_TYPES: Mapping[str, str] = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "an object with fields",
    "model_type": "an object with fields",
    "list_type": "a list",
    "tuple_type": "a list",
    "datetime_type": "a time, such as 2030-01-01T00:00:00Z",
    "datetime_parsing": "a time, such as 2030-01-01T00:00:00Z",
    "datetime_from_date_parsing": "a time, such as 2030-01-01T00:00:00Z",
    "timezone_aware": "a time with its zone, such as 2030-01-01T00:00:00Z",
}
"""Code of an error to what the value must be."""


def _count(least_or_most: str, number: int, what: str, whats: str) -> str:
    if least_or_most == "least" and number == 1:
        return "must not be empty"
    return f"must have at {least_or_most} {number} {what if number == 1 else whats}"


def _bound(value: object) -> str:
    """A bound as the user would write it. pydantic gives that of a duration as Python would."""
    if isinstance(value, str) and value.startswith("datetime.timedelta("):
        value = timedelta(**{unit: int(number) for unit, number in _TIMEDELTA.findall(value)})
    return durations.render(value) if isinstance(value, timedelta) else str(value)


_OTHERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "missing": lambda _: "is missing",
    "extra_forbidden": lambda _: "there is no such field",
    "string_too_long": lambda ctx: _count("most", ctx["max_length"], "character", "characters"),
    "string_too_short": lambda ctx: _count("least", ctx["min_length"], "character", "characters"),
    "too_long": lambda ctx: _count("most", ctx["max_length"], "entry", "entries"),
    "too_short": lambda ctx: _count("least", ctx["min_length"], "entry", "entries"),
    "string_pattern_mismatch": lambda ctx: PATTERNS.get(ctx["pattern"], "has a form that is not allowed here"),
    "enum": lambda ctx: f"must be {ctx['expected']}",
    "literal_error": lambda ctx: f"must be {ctx['expected']}",
    "greater_than_equal": lambda ctx: f"must be at least {_bound(ctx['ge'])}",
    "greater_than": lambda ctx: f"must be more than {_bound(ctx['gt'])}",
    "less_than_equal": lambda ctx: f"must be at most {_bound(ctx['le'])}",
    "less_than": lambda ctx: f"must be less than {_bound(ctx['lt'])}",
}
"""Code of an error to what is wrong, from the bounds that the error names."""


def problem(errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with one value.

    Args:
        errors: pydantic's errors about it. A value that may have one of several types has one for each.
    """
    wanted = list(dict.fromkeys(_TYPES[error["type"]] for error in errors if error["type"] in _TYPES))
    others = [error for error in errors if error["type"] not in _TYPES]
    if not others:  # a value of the right type has a better reason
        return f"must be {' or '.join(wanted)}"
    error = others[0]
    if error["type"] in _OTHERS:
        return _OTHERS[error["type"]](error.get("ctx", {})) + _excess(error)
    text = error["msg"].removeprefix("Value error, ")
    return text.replace("Input should be", "must be", 1) if text.startswith("Input should be") else text


def _excess(error: ErrorDetails) -> str:
    """The length of a value that is too long, as words."""
    if error["type"] not in {"string_too_long", "too_long"} or not isinstance(error["input"], Sized):
        return ""
    return f", and has {len(error['input'])}"
