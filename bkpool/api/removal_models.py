"""The request and response bodies of `POST /api/v1/pools/delete`.

They say which pool is meant, and never who may delete it.
"""

from __future__ import annotations

from pydantic import StrictBool

from bkpool.api.models import Body, Namespace, ObjectName
from bkpool.core.names import DEFAULT_NAMESPACE


class DeletePoolBody(Body):
    """A pool to delete. With now, its builds are cut and its caches are not kept."""

    pool_name: ObjectName
    namespace: Namespace = DEFAULT_NAMESPACE
    now: StrictBool = False


class DeletePoolAnswer(Body):
    """A pool that is being removed."""

    status: str
    leases: int
    """Leases that go on."""
    message: str
    """What is left of it, and until when."""
