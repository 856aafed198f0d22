"""Writes an answer inside its handler, so that the handler can act on a caller who has gone.

aiohttp writes an answer after its handler has returned, and then nobody learns that its caller has hung up.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from aiohttp import web
from pydantic import BaseModel

from bkpool.allocation import Delivery
from bkpool.api.caller_socket import SocketReceipt

SENT = web.RequestKey("sent", web.StreamResponse)
"""The response that was written inside the handler of this request."""


class AnswersEarly(Protocol):
    """A connection that can be answered inside a handler."""

    def answer_begins(self) -> bool:
        """The answer to the present request is written from now on. Returns whether its caller is there."""

    def receipt(self) -> SocketReceipt:
        """What will become of the answer that was just written."""


def json_answer(answer: BaseModel) -> web.Response:
    """The response with this body."""
    return web.json_response(text=answer.model_dump_json(by_alias=True, exclude_none=True))


async def send_now(request: web.Request, response: web.Response) -> SocketReceipt:
    """Writes a response. The handler must return the same one.

    Returns:
        What will become of it.

    Raises:
        CancelledError: The caller has hung up, so their request is cancelled, as if that had been seen earlier.
    """
    connection: AnswersEarly = request.protocol  # type: ignore[assignment]  # bkpool.api.server makes all of them
    if not connection.answer_begins():
        raise asyncio.CancelledError
    request[SENT] = response
    try:
        await response.prepare(request)
        await response.write_eof()
        receipt = connection.receipt()
    except ConnectionError:
        raise asyncio.CancelledError from None
    with suppress(asyncio.CancelledError):  # the connection has ended, and the receipt knows how
        await asyncio.sleep(0)  # uvloop writes at the end of this turn
    if receipt.delivery() is Delivery.LOST:
        if request.transport is not None:
            request.transport.close()
        raise asyncio.CancelledError
    return receipt
