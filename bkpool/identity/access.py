"""From a request's Authorization header to a Caller, and from a Caller to a decision about a pool.

A credential is never logged, kept or put into an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Forbidden, Unauthenticated, Unavailable
from bkpool.core.pool import Pool
from bkpool.identity import Authenticator, Caller, Identity, Verdict
from bkpool.identity.rules import AccessDecision, decide, unconfigured

LONGEST_BEARER = 16_384
"""Characters. GitHub's tokens have about 1,500, Azure's with many groups some thousands."""
_BEARER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")  # RFC 6750 2.1, with the b64token of RFC 7235
_HINT = (
    "Send Authorization: Bearer <token>: an ID token of an issuer that is configured here, or the admin's, which "
    "bkpool finds by itself on the machine of the appliance; elsewhere set BKCTL_TOKEN."
)

_ASK = "Ask whoever runs this appliance; `bkpool auth check` explains a decision."


class AccessControl:
    """Who is calling, and may they.

    Args:
        authenticators: The ways of knowing a caller, in order.
        pools: All pools as of now.
        configs: All configured issuers as of now.
    """

    def __init__(
        self,
        authenticators: Sequence[Authenticator],
        pools: Callable[[], Collection[Pool]],
        configs: Callable[[], Collection[OIDCConfig]],
    ) -> None:
        self._authenticators = authenticators
        self._pools = pools
        self._configs = configs

    async def caller(self, authorization: Sequence[str]) -> Caller:
        """Whom a request comes from.

        Args:
            authorization: Every Authorization header of the request (`headers.getall("Authorization", [])`).

        Raises:
            Unauthenticated: There is not exactly one bearer token, or nobody here takes it; the message says why.
            Forbidden: The token is genuine, and its holder is not let in: a stranger of a known issuer.
            Unavailable: Whoever could tell is away.
        """
        caller = await self.known(bearer_token(authorization))
        if caller.identities:
            return caller
        if any(verdict.genuine for verdict in caller.verdicts):
            raise Forbidden(refusal(caller), hint=_ASK)
        raise Unauthenticated(refusal(caller), hint=_HINT)

    async def known(self, bearer: str) -> Caller:
        """Everything that is known of a bearer token, also if it is nothing.

        Raises:
            Unavailable: Somebody who could tell is away, and nobody else knows the token.
        """
        verdicts: list[Verdict] = []
        away: Unavailable | None = None
        for authenticator in self._authenticators:
            try:
                verdicts += await authenticator.authenticate(bearer)
            except Unavailable as error:
                away = away or error
        caller = Caller(tuple(verdicts))
        if away is not None and not caller.identities:
            raise away
        return caller

    def decide(self, identities: Iterable[Identity], pool: Pool) -> AccessDecision:
        """Whether one of these may use the pool, and why."""
        return decide(identities, pool, open_to_all=self.open_to_all)

    @property
    def open_to_all(self) -> bool:
        """Whether nobody has said yet who may use what."""
        return unconfigured(self._pools(), self._configs())


def refusal(caller: Caller) -> str:
    """Why nobody takes a credential."""
    reasons = dict.fromkeys(verdict.refusal for verdict in caller.verdicts if verdict.refusal)
    return f"The bearer token is refused: {'; '.join(reasons)}" if reasons else "The bearer token is not known here"


def forbidden(decision: AccessDecision, pool: str) -> Forbidden:
    """The error of a decision against a caller."""
    name = decision.identity.name if decision.identity else "the caller"
    return Forbidden(
        f"{name} may not use pool {pool}: {decision.reason}",
        hint=_ASK,
    )


def bearer_token(authorization: Sequence[str]) -> str:
    """The token in the Authorization headers of a request.

    Raises:
        Unauthenticated: There is no header, more than one, or it is not a bearer token.
    """
    if not authorization:
        raise Unauthenticated("The request has no Authorization header", hint=_HINT)
    if len(authorization) > 1:
        raise Unauthenticated("The request has more than one Authorization header", hint="Send one.")
    header = authorization[0].strip(" \t")
    match = _BEARER.fullmatch(header)
    if match is None or len(match[1]) > LONGEST_BEARER:
        raise Unauthenticated("The Authorization header is not a bearer token", hint=_HINT)
    return match[1]
