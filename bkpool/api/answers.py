"""What is answered when something is wrong: one shape for all errors, as JSON."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web

from bkpool.api import models
from bkpool.core.errors import BkpoolError


def error_answer(
    error: BkpoolError, *, status: int | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """The answer that tells of an error.

    Args:
        error: What is wrong.
        status: Instead of the error's own.
        headers: Further ones.
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
    """What a caller is told of a fault of ours."""
    return BkpoolError("an internal error", hint="`bkpool logs` has the details; please report it.")
