"""What an answer of the Kubernetes API means in bkpool's own errors.

A pure function of the answer; it decides nothing about trying again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus

from bkpool.core.errors import (
    BkpoolError,
    Conflict,
    Forbidden,
    Gone,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
)

_LONGEST = 600  # characters of a server's message: it may quote a whole object

_MEANING: dict[int, tuple[Callable[..., BkpoolError], str]] = {
    HTTPStatus.BAD_REQUEST: (InvalidInput, "Correct the field that is named."),
    HTTPStatus.UNPROCESSABLE_ENTITY: (InvalidInput, "Correct the field that is named."),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (InvalidInput, "The object is too large: remove what is not needed."),
    HTTPStatus.UNAUTHORIZED: (Unauthenticated, "The credentials in the kubeconfig are not valid, or no longer."),
    HTTPStatus.FORBIDDEN: (Forbidden, "Give bkpool this right; `bkpool manifests` prints the rights that it needs."),
    HTTPStatus.NOT_FOUND: (NotFound, ""),
    HTTPStatus.CONFLICT: (Conflict, "Read it again and repeat the change."),
    HTTPStatus.GONE: (Gone, "List again."),
}


def error_of(status: int, body: bytes, *, what: str, retry_after: str | None = None) -> BkpoolError:
    """The error that an answer is.

    Args:
        status: The HTTP status, 400 or more (or the code of an ERROR event of a watch).
        body: The answer; a Status object where the API server itself wrote it.
        what: Method and path, for the message.
        retry_after: The header of that name.
    """
    message = f"Kubernetes: {what}: {_said(body) or f'HTTP {status}'}"
    made = _MEANING.get(status)
    if made is None:
        seconds = int(retry_after) if retry_after and retry_after.isdigit() else None
        hint = "The Kubernetes API server is overloaded or away; it is asked again."
        return Unavailable(message, hint=hint, retry_after=seconds)
    kind, hint = made
    return kind(message, hint=hint, field=_field(body))


def _said(body: bytes) -> str:
    try:
        told = json.loads(body)
        return str(told["message"])[:_LONGEST]
    except (ValueError, KeyError, TypeError):
        return body[:_LONGEST].decode(errors="replace").strip()


def _field(body: bytes) -> str | None:
    """The first field that the server found wrong, where it names one."""
    try:
        return str(json.loads(body)["details"]["causes"][0]["field"])
    except (ValueError, KeyError, TypeError, IndexError):
        return None
