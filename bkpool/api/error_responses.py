"""Turns an error into a response: every error of the API has the same JSON shape."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web

from bkpool.api import models
from bkpool.core.errors import BkpoolError


def error_response(
    error: BkpoolError, *, status: int | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """The response for an error.

    Args:
        error: What is wrong.
        status: The HTTP status instead of the error's own.
        headers: Further headers.
    """
    detail = models.ErrorDetail(code=error.code, message=error.message, hint=error.hint, field=error.field)
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(
        text=models.ErrorAnswer(error=detail).model_dump_json(by_alias=True, exclude_none=True),
        status=status or error.status,
        headers=headers,
    )


def internal_error() -> BkpoolError:
    """What a caller sees of a defect of bkpool: no detail of it."""
    return BkpoolError("an internal error", hint="`bkpool logs` shows the details; please report it.")
