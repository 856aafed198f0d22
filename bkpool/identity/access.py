"""Turns a request's Authorization header into a Caller, and decides whether the caller may use a pool.

A credential is never logged, stored or put into an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Forbidden, Unauthenticated, Unavailable
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import RememberedCaller
from bkpool.core.worker import Lease
from bkpool.identity import Authenticator, Caller, Identity, Verdict
from bkpool.identity.remembering import LONGEST, whole
from bkpool.identity.rules import AccessDecision, decide, decide_by_name, unconfigured

LONGEST_BEARER = 16_384
"""Characters. GitHub's tokens have about 1,500, Azure's with many groups some thousands."""
_BEARER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")  # RFC 6750 2.1, with the b64token of RFC 7235
_HINT = (
    "Set BKCTL_TOKEN (or send `Authorization: Bearer TOKEN`) to an ID token of a configured issuer, or to the admin "
    "token. On the machine of the appliance, bkpool finds the admin token by itself."
)

_ASK_OPERATOR = "Ask the operator of this appliance for access. `bkpool auth check` explains a decision."


_TOO_LARGE = (
    f"groups and claims of the caller have more than {LONGEST} bytes, so the lease does not remember them. Renew it "
    "by its worker, with the caller's own token (`bkpool renew --worker NAME`)"
)


class AccessControl:
    """Identifies callers, and decides which pools they may use.

    Args:
        stages: The methods to identify a caller, in order. Those of a later stage are asked only about a token that
            no earlier stage accepts, so that what makes them slow does not concern other callers.
        pools: Returns all current pools.
        configs: Returns all currently configured issuers.
        only_admin: Why nobody but the admin may be served; None: everybody may who has a right.
        any_unreadable: Whether a pool or an issuer cannot be read now. It may restrict access.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Authenticator]],
        pools: Callable[[], Collection[Pool]],
        configs: Callable[[], Collection[OIDCConfig]],
        only_admin: Forbidden | None = None,
        *,
        any_unreadable: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stages = stages
        self._pools = pools
        self._configs = configs
        self._only_admin = only_admin
        self._any_unreadable = any_unreadable

    async def caller(self, authorization: Sequence[str], pool: Key | None = None) -> Caller:
        """Identifies the caller of a request.

        Args:
            authorization: Every Authorization header of the request (`headers.getall("Authorization", [])`).
            pool: The pool that the request is about, if there is one.

        Raises:
            Unauthenticated: There is not exactly one bearer token, or no authenticator accepts it; the message says
                why.
            Forbidden: The token is genuine, but its holder has no access here, for example another user of a
                public issuer; or nobody but the admin is served.
            Unavailable: The authenticator that could decide cannot reach its issuer or API server.
        """
        caller = await self.authenticate(bearer_token(authorization), pool)
        if caller.identities:
            if self._only_admin and not any(identity.admin for identity in caller.identities):
                raise self._only_admin
            return caller
        if any(verdict.genuine for verdict in caller.verdicts):
            raise Forbidden(refusal(caller), hint=_ASK_OPERATOR)
        raise Unauthenticated(refusal(caller), hint=_HINT)

    async def authenticate(self, bearer: str, pool: Key | None = None) -> Caller:
        """Collects the results for a bearer token up to the first stage that accepts it, even if none does.

        Args:
            bearer: The token.
            pool: The pool that the request is about, if there is one.

        Raises:
            Unavailable: One authenticator cannot decide now, and no other accepts the token.
        """
        verdicts: list[Verdict] = []
        unavailable: Unavailable | None = None
        for stage in self._stages:
            for authenticator in stage:
                try:
                    verdicts += await authenticator.authenticate(bearer, pool)
                except Unavailable as error:
                    unavailable = unavailable or error
            caller = Caller(tuple(verdicts))
            if caller.identities:
                return caller
        if unavailable is not None:
            raise unavailable
        return Caller(tuple(verdicts))

    async def still_allowed(self, lease: Lease, pool: Pool) -> AccessDecision:
        """Whether the caller who made a lease may use its pool today, by what the lease remembers of them.

        Nothing is asked of an issuer. A lease of an earlier version is judged by the caller's name.

        Raises:
            Unavailable: Today's tokens of the pool cannot be read now.
        """
        remembered = lease.caller
        if remembered is None:
            return decide_by_name(lease.requested_by, lease.holder, pool)
        if not remembered.complete:
            return AccessDecision(allowed=False, reason=_TOO_LARGE)
        return await self._decide_recalled(remembered, pool)

    async def may_still(self, identity: Identity, pool: Pool) -> AccessDecision:
        """Whether a caller who was identified some time ago may use the pool today. Nothing is asked of an issuer.

        Raises:
            Unavailable: Today's tokens of the pool cannot be read now.
        """
        decision, caller = self.decide([identity], pool), whole(identity)
        if not decision.allowed or identity.admin or caller is None:
            return decision
        return await self._decide_recalled(caller, pool)

    async def _decide_recalled(self, remembered: RememberedCaller, pool: Pool) -> AccessDecision:
        asked = [authenticator for stage in self._stages for authenticator in stage]
        verdicts = [verdict for one in asked for verdict in await one.recall(remembered, pool)]
        caller = Caller(tuple(verdicts))
        if caller.identities:
            return self.decide(caller.identities, pool)
        reasons = dict.fromkeys(verdict.refusal for verdict in verdicts if verdict.refusal)
        return AccessDecision(allowed=False, reason="; ".join(reasons) or "callers like them are not known here now")

    def decide(self, identities: Iterable[Identity], pool: Pool) -> AccessDecision:
        """Whether one of these identities may use the pool, and why."""
        return decide(identities, pool, open_to_all=self.open_to_all)

    @property
    def open_to_all(self) -> bool:
        """Whether access is not configured yet, so that every authenticated caller may use every pool."""
        return not self._any_unreadable() and unconfigured(self._pools(), self._configs())


def refusal(caller: Caller) -> str:
    """The message for a credential that no authenticator accepts."""
    reasons = dict.fromkeys(verdict.refusal for verdict in caller.verdicts if verdict.refusal)
    return f"the bearer token is refused: {'; '.join(reasons)}" if reasons else "the bearer token is not known here"


def not_renewable(decision: AccessDecision, pool: str) -> Forbidden:
    """The error for a lease whose maker may not use its pool any more. It does not name them."""
    return Forbidden(
        f"this lease cannot be renewed: the caller who made it may not use pool {pool} now: {decision.reason}",
        hint="It runs to its end. Ask the operator of this appliance for access, then allocate again.",
        code="NotRenewable",
    )


def forbidden(decision: AccessDecision, pool: str) -> Forbidden:
    """The error for a caller who may not use the pool."""
    name = decision.identity.name if decision.identity else "the caller"
    return Forbidden(
        f"{name} may not use pool {pool}: {decision.reason}",
        hint=_ASK_OPERATOR,
    )


def bearer_token(authorization: Sequence[str]) -> str:
    """The token in the Authorization headers of a request.

    Raises:
        Unauthenticated: There is no header, more than one, or it is not a bearer token.
    """
    if not authorization:
        raise Unauthenticated("the request has no Authorization header", hint=_HINT)
    if len(authorization) > 1:
        raise Unauthenticated("the request has more than one Authorization header", hint="Send exactly one.")
    header = authorization[0].strip(" \t")
    match = _BEARER.fullmatch(header)
    if match is None or len(match[1]) > LONGEST_BEARER:
        raise Unauthenticated("the Authorization header is not a bearer token", hint=_HINT)
    return match[1]
