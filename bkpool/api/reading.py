"""What comes in, checked: bodies against their models, and names in paths.

An error about a body does not quote it, because there are tokens in bodies.
"""

from __future__ import annotations

import asyncio
import json
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from bkpool.core.errors import InvalidInput
from bkpool.core.resource import explain

PATIENCE = 30.0
"""Seconds for a body to arrive. aiohttp has no such bound, and waits for ever after a chunk that is none."""

B = TypeVar("B", bound=BaseModel)


async def read(request: web.Request, model: type[B]) -> B:
    """The request's body.

    Raises:
        InvalidInput: It is not as the model has it; the message names the field.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            raw = await request.read()
    except (web.RequestPayloadError, TimeoutError):
        raise InvalidInput("the body is broken or too slow", hint="Send a JSON object.", field="body") from None
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not JSON text"
        raise InvalidInput(f"the body is not JSON: {reason}", hint="Send a JSON object.", field="body") from None
    try:
        return model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise explain(error, shown=False) from None
