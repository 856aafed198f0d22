"""Errors of the API in the words of the command line: a field of a request becomes the option that the user typed.

Pure; it sends nothing and shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkpool.core import errors
from bkpool.core.errors import BkpoolError

OPTIONS: Mapping[str, str] = {
    "poolName": "--pool",
    "name": "--pool",
    "namespace": "--namespace",
    "jobId": "--job-id",
    "ttl": "--ttl",
    "wait": "--wait",
    "token": "--token",
    "workerName": "--worker",
    "leaseId": "--lease",
    "identity": "--identity",
    "tenant": "--tenant",
}
"""Field of a request to option. A field of the user's own file, such as spec.scaling.max, keeps its name."""


_INVALID = "the request is not valid: "  # how the API begins; the user did not write the request


def error_of(status: int, answer: Mapping[str, Any], options: Mapping[str, str] = OPTIONS) -> BkpoolError:
    """The error that the server raised, of the same class.

    Args:
        status: Of the HTTP answer.
        answer: Its `error`, with a message.
        options: Field of the request to what the user typed for it.
    """
    kinds = BkpoolError.__subclasses__()
    classes = {kind.__name__: kind for kind in (*kinds, *(more for kind in kinds for more in kind.__subclasses__()))}
    by_status: dict[int, type[BkpoolError]] = {
        kind.status: kind for kind in classes.values() if kind is not errors.HostFault
    }
    code = str(answer.get("code") or "")
    kind = classes.get(code) or by_status.get(status, BkpoolError)
    field = str(answer.get("field") or "")
    return kind(
        _named(str(answer["message"]), field, options),
        hint=str(answer.get("hint") or ""),
        code=code or None,
        exit_code=errors.EXIT.get(code),
        field=options.get(field, field) or None,
        retry_after=answer.get("retryAfter"),
    )


def _named(message: str, field: str, options: Mapping[str, str]) -> str:
    """The message with the option before it, in place of the field's name."""
    option = options.get(field)
    return f"{option}: {message.removeprefix(f'{field}: ').removeprefix(_INVALID)}" if option else message
