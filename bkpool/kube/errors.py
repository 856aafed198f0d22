"""Turns an error response of the Kubernetes API into one of bkpool's errors.

A pure function of the response. It does not decide whether to try again.
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

_LONGEST_MESSAGE = 600  # characters: the server may quote a whole object

_ERRORS: dict[int, tuple[Callable[..., BkpoolError], str]] = {
    HTTPStatus.BAD_REQUEST: (InvalidInput, "Correct the field that the message names."),
    HTTPStatus.UNPROCESSABLE_ENTITY: (InvalidInput, "Correct the field that the message names."),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (
        InvalidInput,
        "The object is too large: remove the parts that you do not need.",
    ),
    HTTPStatus.UNAUTHORIZED: (Unauthenticated, "The credentials in the kubeconfig are not valid, or have expired."),
    HTTPStatus.FORBIDDEN: (Forbidden, "Grant bkpool this right; `bkpool manifests` prints the rights that it needs."),
    HTTPStatus.NOT_FOUND: (NotFound, ""),
    HTTPStatus.CONFLICT: (Conflict, "Read it again and repeat the change."),
    HTTPStatus.GONE: (Gone, "List again."),
}


def error_of(status: int, body: bytes, *, what: str, retry_after: str | None = None) -> BkpoolError:
    """The error that a response stands for.

    Args:
        status: The HTTP status, 400 or more, or the code of a watch's ERROR event.
        body: The response; a Status object if the API server itself wrote it.
        what: Method and path, for the message.
        retry_after: The Retry-After header.
    """
    message = f"Kubernetes: {what}: {_message(body) or f'HTTP {status}'}"
    known = _ERRORS.get(status)
    if known is None:
        seconds = int(retry_after) if retry_after and retry_after.isdigit() else None
        hint = "The Kubernetes API server is overloaded or cannot be reached; bkpool tries again."
        return Unavailable(message, hint=hint, retry_after=seconds)
    kind, hint = known
    return kind(message, hint=hint, field=_field(body))


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])[:_LONGEST_MESSAGE]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:_LONGEST_MESSAGE].decode(errors="replace").strip()


def _field(body: bytes) -> str | None:
    """The first field that the server rejects, if it names one."""
    try:
        return str(json.loads(body)["details"]["causes"][0]["field"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
