"""The routes: each reads its body, asks who is calling and what they may do, and calls the lease service.

A response never reveals pools that the caller may not use, or leases of others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from aiohttp import web

from bkpool.allocation import Allocator, LeaseService, OwnLease, PoolRemover, Revoker
from bkpool.allocation.leases import find_pool
from bkpool.api import models
from bkpool.api.answering import json_answer, send_now
from bkpool.api.audit import AuditTrail
from bkpool.api.bodies import read_body
from bkpool.api.limits import ApiLimits
from bkpool.api.openapi import ApiRoute, Bearer
from bkpool.api.removal_models import DeletePoolAnswer, DeletePoolBody
from bkpool.api.revocation_models import RevokeAnswer, RevokeBody
from bkpool.core.errors import DiskFull, Forbidden, Unauthenticated, Unavailable
from bkpool.core.gateway_heartbeat import open_connections
from bkpool.core.names import AUDIENCE, DEFAULT_NAMESPACE, Key, check_name
from bkpool.core.pool import Pool
from bkpool.core.removal import REASON as REMOVED
from bkpool.core.removal import removal_of
from bkpool.core.worker import Worker
from bkpool.identity import Caller, Identity
from bkpool.identity.access import AccessControl, bearer_token, forbidden, not_renewable, refusal
from bkpool.identity.rules import AccessDecision, decide, is_theirs
from bkpool.store.mirror import Mirror


async def always_ready() -> str | None:
    """For a process of which nothing else is to be asked."""
    return None


@dataclass(frozen=True, slots=True)
class Service:
    """The routes, and what they need."""

    allocator: Allocator
    leases: LeaseService
    revoker: Revoker
    remover: PoolRemover
    mirror: Mirror
    access: AccessControl
    now: Callable[[], datetime]
    gateway_endpoint: Callable[[Pool], str]
    """Where callers reach the gateway of a pool."""
    connections: Callable[[Pool], int]
    """The number of open connections of a pool."""
    unavailable_reason: Callable[[], str | None]
    """Why nothing can be leased at the moment; None if leases are possible."""
    worker_connections: Callable[[Pool], Mapping[str, int]] | None = None
    """The number of open connections of each worker of a pool; None: what its gateways registered."""
    not_ready_reason: Callable[[], Awaitable[str | None]] = always_ready
    """Returns why this replica should get no new requests although it still answers them; None if it should."""
    full_disk: Callable[[], DiskFull | None] = lambda: None
    """Why no new lease is made although the store answers; None if there is room for what a lease needs."""
    audience: str = AUDIENCE
    """What ID tokens must be made for, where the configuration of their issuer names no audience."""
    limits: ApiLimits = ApiLimits()  # noqa: RUF009 - immutable

    def routes(self) -> list[ApiRoute]:
        """Every route, with its bodies, its errors and its name in the audit trail."""
        v1, workers, either, nothing = "/api/v1", "/api/v1/workers", Bearer.OPTIONAL, Bearer.NONE
        status = models.StatusAnswer
        return [
            ApiRoute(
                *("POST", f"{workers}/allocate", self.allocate, models.AllocateBody, models.AllocateAnswer),
                action="allocate",
                errors=(404, 410, 429, 502, 503, 507),
            ),
            ApiRoute(
                *("POST", f"{workers}/renew", self.renew, models.RenewBody, models.RenewAnswer, either),
                action="renew",
                errors=(401, 403, 404, 410, 503, 507),
            ),
            ApiRoute(
                *("POST", f"{workers}/lookup", self.lookup, models.TokenBody, models.LookupAnswer, nothing),
                action="lookup",
                errors=(404, 410),
            ),
            ApiRoute(
                *("POST", f"{workers}/release", self.release, models.ReleaseBody, status, either),
                action="release",
                errors=(401, 404, 507),
            ),
            ApiRoute(
                *("POST", f"{workers}/revoke", self.revoke, RevokeBody, RevokeAnswer),
                action="revoke",
                errors=(404, 409, 507),
            ),
            ApiRoute(
                *("POST", f"{v1}/auth/check", self.check, models.CheckBody, models.CheckAnswer, either),
                action="auth-check",
                errors=(404, 503),
            ),
            ApiRoute("GET", f"{v1}/pools", self.pools, None, models.PoolsAnswer, action="pools"),
            ApiRoute(
                "GET", f"{v1}/pools/{{name}}", self.pool, None, models.PoolAnswer, action="pool", errors=(400, 404)
            ),
            ApiRoute(
                *("POST", f"{v1}/pools/delete", self.delete_pool, DeletePoolBody, DeletePoolAnswer),
                action="pool-delete",
                errors=(404, 409),
            ),
            ApiRoute("GET", f"{v1}/issuers", self.issuers, None, models.IssuersAnswer, action="issuers"),
            ApiRoute("GET", f"{v1}/audience", self.own_audience, None, models.AudienceAnswer, nothing),
            *(ApiRoute("GET", f"{at}/health", self.health, None, status, nothing) for at in ("", v1)),
            *(ApiRoute("GET", f"{at}/ready", self.ready, None, status, nothing, errors=(503,)) for at in ("", v1)),
        ]

    async def allocate(self, request: web.Request, trail: AuditTrail) -> web.StreamResponse:
        """Lease a worker; waits until one is ready."""
        bearer_token(_authorization(request))
        self._check_ready()
        wanted = (await read_body(request, models.AllocateBody)).request(self.limits.max_wait)
        caller = await self._caller(request, trail, wanted.pool)
        pool, identity = self._admit(caller, wanted.pool, trail)
        if full := self.full_disk():
            raise full

        async def may_still(today: Pool) -> None:
            decision = await self.access.may_still(identity, today)
            if not decision.allowed:
                trail.set_decision(allowed=False, reason=decision.reason)
                raise forbidden(
                    AccessDecision(allowed=False, reason=decision.reason, identity=identity), str(pool.key)
                )

        async with self.allocator.offer(identity, wanted, may_still) as offer:
            _add_lease(trail, offer.grant.worker)
            endpoint = self.gateway_endpoint(self.mirror.pools.get(pool.key, pool))
            response = json_answer(models.AllocateAnswer.of(offer.grant, endpoint))
            offer.answered(await send_now(request, response))
        return response

    async def renew(self, request: web.Request, trail: AuditTrail) -> models.RenewAnswer:
        """Extend a lease."""
        body = await read_body(request, models.RenewBody)
        lease = await self._lease(request, body, trail)

        async def may_renew(worker: Worker, pool: Pool) -> None:
            _add_lease(trail, worker)
            trail.add_facts(identity=worker.held_lease.requested_by)
            if removal_of(pool) is not None:
                decision = AccessDecision(allowed=False, reason=REMOVED)
            elif isinstance(lease, OwnLease):
                decision = self.access.decide(lease.identities, pool)
            else:
                decision = await self.access.still_allowed(worker.held_lease, pool)
            if not decision.allowed:
                raise not_renewable(decision, str(pool.key))

        worker = await self.leases.renew(lease, body.ttl, may_renew)
        _add_allowed(trail, lease, worker)
        return models.RenewAnswer(worker_name=worker.key.name, expires_at=worker.held_lease.expires_at)

    async def lookup(self, request: web.Request, trail: AuditTrail) -> models.LookupAnswer:
        """Get the worker of a lease."""
        token = (await read_body(request, models.TokenBody)).token
        worker = await self.leases.lookup(token)
        _add_allowed(trail, token, worker)
        return models.LookupAnswer(
            worker_endpoint=worker.status.endpoint or "", worker_name=worker.key.name, pool_name=worker.pool.name
        )

    async def release(self, request: web.Request, trail: AuditTrail) -> models.StatusAnswer:
        """End a lease."""
        body = await read_body(request, models.ReleaseBody)
        lease = await self._lease(request, body, trail)
        if body.now:
            trail.add_facts(now="true")
        _add_allowed(trail, lease, await self.leases.release(lease, now=body.now))
        return models.StatusAnswer(status="released")

    async def revoke(self, request: web.Request, trail: AuditTrail) -> RevokeAnswer:
        """End leases and cut their connections and builds: the caller's own ones, or any for the admin."""
        caller = await self._caller(request, trail)
        selector = (await read_body(request, RevokeBody)).selector()
        trail.add_facts(selection=str(selector))
        done = await self.revoker.revoke(selector, caller.identities)
        admin = next((one for one in caller.identities if one.admin), None)
        trail.add_identity(admin)
        trail.add_facts(revoked=str(len(done.revoked)), failed=str(len(done.failed)))
        trail.set_decision(allowed=True, reason="the admin may" if admin else "callers may revoke their own leases")
        return RevokeAnswer.of(done)

    async def check(self, request: web.Request, trail: AuditTrail) -> models.CheckAnswer:
        """Check whether a bearer token may use a pool, and why."""
        body = await read_body(request, models.CheckBody)
        pool = Key(body.namespace, body.pool_name)
        admin = await self._is_admin(request, pool)
        caller = await self.access.authenticate(body.token, pool)
        trail.add_facts(pool=str(pool))
        decision = self._decide(caller.identities, pool, reveal=admin)
        if not caller.identities:
            decision = AccessDecision(allowed=False, reason=refusal(caller))
        trail.add_identity(decision.identity)
        trail.set_decision(allowed=decision.allowed, reason=decision.reason)
        return models.CheckAnswer.of(decision, caller, all_verdicts=admin)

    async def pools(self, request: web.Request, trail: AuditTrail) -> models.PoolsAnswer:
        """List the pools that the caller may use."""
        caller = await self._caller(request, trail)
        open_to_all = self.access.open_to_all  # computed once, because it looks at all pools
        usable = [
            pool
            for _, pool in sorted(self.mirror.pools.items())
            if decide(caller.identities, pool, open_to_all=open_to_all).allowed
        ]
        trail.set_decision(allowed=True, reason=f"{len(usable)} of {len(self.mirror.pools)} pools may be used")
        views = [models.PoolView.of(pool, **self._live(pool)) for pool in usable]
        if any(identity.admin for identity in caller.identities):  # whoever else may use them cannot be read either
            unreadable = sorted(self.mirror.unreadable_pools.values(), key=lambda found: found.key)
            views += [models.PoolView.of_unreadable(one, **self._live(one.stand_in(Pool))) for one in unreadable]
        return models.PoolsAnswer(pools=tuple(views))

    async def pool(self, request: web.Request, trail: AuditTrail) -> models.PoolAnswer:
        """Get one pool and its workers."""
        bearer_token(_authorization(request))
        namespace = check_name(request.query.get("namespace") or DEFAULT_NAMESPACE, field="namespace")
        wanted = Key(namespace, check_name(request.match_info["name"], field="name"))
        caller = await self._caller(request, trail, wanted)
        pool, _ = self._admit(caller, wanted, trail)
        workers = sorted(self.mirror.workers_of(pool.key), key=lambda worker: worker.slot)
        open_now = self.worker_connections(pool) if self.worker_connections else None
        heartbeats = self.mirror.heartbeats.known
        members = tuple(
            models.WorkerView.of(
                one,
                self.now(),
                whole=_is_theirs(caller, one),
                connections=open_connections(one, heartbeats) if open_now is None else open_now.get(one.key.name, 0),
            )
            for one in workers
        )
        return models.PoolAnswer.of(pool, members=members, **self._live(pool))

    async def delete_pool(self, request: web.Request, trail: AuditTrail) -> DeletePoolAnswer:
        """Delete a pool: it gives no more leases, and is gone when nothing of it is left."""
        caller = await self._caller(request, trail)
        admin = next((one for one in caller.identities if one.admin), None)
        if admin is None:
            name = caller.identities[0].name
            raise Forbidden(f"{name} may not delete pools", hint="Use the admin's token.")
        body = await read_body(request, DeletePoolBody)
        pool = Key(body.namespace, body.pool_name)
        trail.add_facts(pool=str(pool), **({"now": "true"} if body.now else {}))
        trail.add_identity(admin)
        trail.set_decision(allowed=True, reason="the admin may")
        removal = await self.remover.remove(pool, caller.identities, at_once=body.now)
        return DeletePoolAnswer(status="removing", leases=removal.leases, message=removal.what_happens)

    async def issuers(self, request: web.Request, trail: AuditTrail) -> models.IssuersAnswer:
        """List the BuildKitOIDCConfigs, and whether each works."""
        identity = (await self._caller(request, trail)).identities[0]
        if not identity.admin:
            raise Forbidden(f"{identity.name} may not list issuers", hint="Use the admin's token.")
        trail.set_decision(allowed=True, reason="the admin may")
        configs = (config for _, config in sorted(self.mirror.configs.items()))
        return models.IssuersAnswer(issuers=tuple(models.IssuerView.of(config, self.audience) for config in configs))

    async def own_audience(self, _request: web.Request, _trail: AuditTrail) -> models.AudienceAnswer:
        """Get the audience that ID tokens for this API must have."""
        return models.AudienceAnswer(audience=self.audience)

    async def health(self, _request: web.Request, _trail: AuditTrail) -> models.StatusAnswer:
        """Check whether the process runs."""
        return models.StatusAnswer(status="ok")

    async def ready(self, _request: web.Request, _trail: AuditTrail) -> models.StatusAnswer:
        """Check whether this replica should get requests."""
        self._check_ready()
        if reason := await self.not_ready_reason():
            raise Unavailable(
                reason, hint="`bkpool logs` says more. Other replicas serve, if there are any.", retry_after=2
            )
        return models.StatusAnswer(status="ready")

    # --- who may what -----------------------------------------------------------------------------------------------

    async def _caller(self, request: web.Request, trail: AuditTrail, pool: Key | None = None) -> Caller:
        """Who calls. Only the credentials of the pool that they ask for can make them wait."""
        caller = await self.access.caller(_authorization(request), pool)
        trail.add_identity(caller.identities[0])
        return caller

    async def _is_admin(self, request: web.Request, pool: Key) -> bool:
        """Whether the request, which asks about this pool, has a valid credential of the admin."""
        try:
            caller = await self.access.caller(_authorization(request), pool)
        except (Unauthenticated, Forbidden):
            return False
        return any(identity.admin for identity in caller.identities)

    def _admit(self, caller: Caller, key: Key, trail: AuditTrail) -> tuple[Pool, Identity]:
        """The pool, and the identity by which the caller may use it.

        Raises:
            Forbidden: They may not use it.
            NotFound: It does not exist, and they may know that.
        """
        trail.add_facts(pool=str(key))
        decision = self._decide(caller.identities, key)
        trail.add_identity(decision.identity)
        if not decision.allowed or decision.identity is None:
            raise forbidden(decision, str(key))
        trail.set_decision(allowed=True, reason=decision.reason)
        return find_pool(self.mirror, key), decision.identity

    def _decide(self, identities: tuple[Identity, ...], key: Key, *, reveal: bool = False) -> AccessDecision:
        """Whether one of the identities may use the pool.

        Args:
            identities: The identities of the caller.
            key: The name of a pool, which need not exist.
            reveal: Whether the caller may learn that it does not exist, whatever their identities are.

        Raises:
            NotFound: It does not exist, and the caller may know that: the admin, or anybody while all pools are open
                to all.
        """
        pool = self.mirror.pools.get(key)
        if pool is not None:
            return self.access.decide(identities, pool)
        if reveal or any(one.admin for one in identities) or (identities and self.access.open_to_all):
            find_pool(self.mirror, key)
        first = identities[0] if identities else None
        return AccessDecision(allowed=False, reason="there is no pool of this name that they may use", identity=first)

    async def _lease(self, request: web.Request, body: models.LeaseBody, trail: AuditTrail) -> str | OwnLease:
        """The lease that the body names: by its token, or by its worker together with the caller's own credential."""
        worker = body.worker
        if worker is None:
            return body.token
        trail.add_facts(worker=str(worker))
        known = self.mirror.workers.get(worker)
        return OwnLease(worker, (await self._caller(request, trail, known.pool if known else None)).identities)

    def _check_ready(self) -> None:
        reason = self.unavailable_reason()
        if reason is not None:
            raise Unavailable(reason, hint="Try again in a moment.", retry_after=2)

    def _live(self, pool: Pool) -> dict[str, Any]:
        return {
            **asdict(self.mirror.index_of(pool.key).counts),
            "waiting": self.allocator.waiting(pool.key),
            "connections": self.connections(pool),
            "gateway_endpoint": self.gateway_endpoint(pool),
        }


def _authorization(request: web.Request) -> list[str]:
    return request.headers.getall("Authorization", [])


def _is_theirs(caller: Caller, worker: Worker) -> bool:
    """Whether the caller may see more of the worker than its name and phase: only those who hold its lease may."""
    return is_theirs(worker.pool, caller.identities, worker.lease.holder if worker.lease else "")


def _add_lease(trail: AuditTrail, worker: Worker) -> None:
    trail.add_facts(pool=str(worker.pool), worker=str(worker.key), allocation=worker.held_lease.id)


def _add_allowed(trail: AuditTrail, lease: str | OwnLease, worker: Worker | None) -> None:
    """Records that the caller may do this with the lease. The worker is None if the lease has ended before."""
    if worker is not None:
        _add_lease(trail, worker)
    if isinstance(lease, str):
        trail.set_decision(allowed=True, reason="the caller has the lease's token")
        if worker is not None:
            trail.add_facts(identity=worker.held_lease.requested_by)
        return
    admin = next((one for one in lease.identities if one.admin), None)
    owner = next((one for one in lease.identities if worker and one.digest == worker.held_lease.holder), None)
    trail.add_identity(admin or owner)
    trail.set_decision(allowed=True, reason="the admin may" if admin else "the caller allocated this lease")
