"""Which objects of a cluster one installation has: those in its pools' namespaces, and issuers in its own one.

Several installations share one cluster and one set of definitions. So the store itself keeps to these bounds: an
object outside of them does not exist for it. Pure: nothing here asks the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bkpool.core.auth import OIDCConfig
from bkpool.core.names import LABEL_POOL, Key
from bkpool.core.pool import Pool
from bkpool.core.resource import Resource
from bkpool.core.worker import Worker


@dataclass(frozen=True, slots=True)
class StoreBounds:
    """The bounds of a store in a cluster. Without arguments it has everything."""

    namespaces: tuple[str, ...] | None = None
    """Where pools and workers are; None: everywhere."""
    own: str | None = None
    """The appliance's own namespace. Issuers that are configured there count for all pools."""
    pool: Key | None = None
    """The only pool that is listed and followed, with its workers; None: all of them."""

    @classmethod
    def of_pool(cls, pool: Key) -> StoreBounds:
        """What a gateway follows: its pool, and the workers of that pool."""
        return cls((pool.namespace,), pool=pool)

    @classmethod
    def of_installation(cls, pool_namespaces: tuple[str, ...], own: str) -> StoreBounds:
        """What an appliance follows that may have pools in these namespaces; without any: in all of them."""
        return cls(tuple(dict.fromkeys(pool_namespaces)) or None, own)

    def scopes(self, kind: type[Resource]) -> tuple[str | None, ...]:
        """The namespaces in which objects of a kind are listed and watched; (None,): all of them at once."""
        if self.namespaces is None:
            return (None,)
        own = (self.own,) if kind is OIDCConfig and self.own is not None else ()
        return tuple(dict.fromkeys((*self.namespaces, *own)))

    def has(self, kind: type[Resource], namespace: str | None) -> bool:
        """Whether objects of a kind may be in this namespace. None asks for all namespaces at once."""
        scopes = self.scopes(kind)
        return None in scopes or namespace in scopes

    def selectors(self, kind: type[Resource], labels: Mapping[str, str] | None = None) -> dict[str, str]:
        """The query parameters by which the API server itself leaves out what is not wanted.

        Args:
            kind: The kind that is listed or watched.
            labels: Labels that the objects must have.
        """
        wanted = dict(labels or {})
        params: dict[str, str] = {}
        if self.pool is not None and kind is Pool:
            params["fieldSelector"] = f"metadata.name={self.pool.name}"
        if self.pool is not None and kind is Worker:
            wanted[LABEL_POOL] = self.pool.name
        if wanted:
            params["labelSelector"] = ",".join(f"{label}={value}" for label, value in wanted.items())
        return params
