"""Reads request bodies and checks them against their models.

An error about a body does not quote it, because bodies contain tokens.
"""

from __future__ import annotations

import asyncio
import json
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from bkpool.core.errors import InvalidInput
from bkpool.core.resource import explain

BODY_TIMEOUT = web.AppKey("body_timeout", float)
"""Seconds for a body of this application to arrive."""

B = TypeVar("B", bound=BaseModel)


async def read_body(request: web.Request, model: type[B]) -> B:
    """The request's body.

    Raises:
        InvalidInput: It does not fit the model; `field` of the error is the JSON field.
    """
    try:
        async with asyncio.timeout(request.app[BODY_TIMEOUT]):
            raw = await request.read()
    except (web.RequestPayloadError, TimeoutError):
        raise InvalidInput(
            "the request body is malformed or arrives too slowly", hint="Send a JSON object.", field="body"
        ) from None
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not JSON text"
        raise InvalidInput(
            f"the request body is not JSON: {reason}", hint="Send a JSON object.", field="body"
        ) from None
    try:
        return model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        found = explain(error, show_value=False)
        reason = found.message.removeprefix(f"{found.field}: ")
        raise InvalidInput(
            f"the request is not valid: {reason}",
            hint="Correct this value.",
            field=found.field,
        ) from None
