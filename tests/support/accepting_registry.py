"""A lease registry without a store, for gateways that get all their leases at the start. It keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping

from bkpool.gateway.session.lease_table import LeaseRoute


class AcceptingRegistry:
    """It accepts every registration and finds no lease."""

    async def register(self, route: LeaseRoute, connections: int) -> None: ...

    async def renew(self, route: LeaseRoute, connections: int) -> None: ...

    async def beat(self, loop: object, leases: Mapping[str, int]) -> None: ...

    async def withdraw(self, route: LeaseRoute) -> None: ...

    async def report_worker(self, route: LeaseRoute, silent_for: float | None) -> None: ...

    async def find(self, token_sha256: str) -> None: ...
