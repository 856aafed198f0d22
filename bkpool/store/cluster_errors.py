"""Turns errors of the API server into those of the Store: they name the object, or the namespace that refuses bkpool.

A caller who reads that something is forbidden takes it for a right of their own. So a right that bkpool lacks is told
as what it is. Pure: it asks nothing and logs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from bkpool.core.errors import Conflict, Forbidden, NotFound
from bkpool.core.names import Key
from bkpool.core.resource import Resource

_LACKS_RIGHT = re.compile(r" cannot (\w+) resource ")
"""In the API server's own sentence. A quota, an admission plugin and a namespace that ends refuse with 403, too."""


@contextmanager
def errors_about(kind: type[Resource], key: Key) -> Iterator[None]:
    """Turns errors of a request about one object."""
    with errors_in(kind, key.namespace):
        try:
            yield
        except NotFound:
            raise NotFound(f"there is no {kind.KIND} {key}") from None
        except Conflict:
            raise Conflict(
                f"{kind.KIND} {key} has changed since it was read", hint="Read it again and repeat the change."
            ) from None


@contextmanager
def errors_in(kind: type[Resource], namespace: str | None) -> Iterator[None]:
    """Turns the refusal of a request about a kind in a namespace, or (None) in all of them."""
    try:
        yield
    except Forbidden as error:
        raise _refusal(kind, namespace, error) from error


def _refusal(kind: type[Resource], namespace: str | None, error: Forbidden) -> Forbidden:
    where = "in any namespace" if namespace is None else f"in namespace {namespace!r}"
    lacks = _LACKS_RIGHT.search(error.message)
    if lacks is None:
        message = f"the cluster refuses a {kind.KIND} {where}: {error.message}"
        return Forbidden(message, hint="Ask whoever runs the cluster.", code="RefusedByCluster")
    option = "" if namespace is None else f" --pool-namespace {namespace}"
    return Forbidden(
        f"bkpool itself may not {lacks[1]} {kind.PLURAL} {where}",
        hint=f"The operator of bkpool must apply what `bkpool manifests{option}` prints (with their other options), "
        "or you use a pool in another namespace.",
        code="RefusedByCluster",
    )
