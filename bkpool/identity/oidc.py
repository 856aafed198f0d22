"""Authenticates callers with a token of an OIDC issuer.

Every configuration of the token's issuer checks the token separately, since they may differ in audience, conditions
and pools. No part of a token is stored or sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from bkpool.core.auth import OIDC, OIDCConfig
from bkpool.core.errors import Unauthenticated
from bkpool.core.names import AUDIENCE, Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import CallerMethod, RememberedCaller
from bkpool.identity import EVERYWHERE, Scope, Verdict
from bkpool.identity.claims import identify
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.jwt import (
    LEEWAY,
    Token,
    looks_like_one,
    parse,
    shown,
    verify_audience,
    verify_claims,
    verify_signature,
)
from bkpool.identity.remembering import claims_of, named_claims, selected

_SOURCE = "OIDC"
_SERVICE_ACCOUNT = "system:serviceaccount:"


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    """One configuration of an issuer, and where its callers' identities are valid."""

    source: str
    """The object that has it, for messages: `BuildKitOIDCConfig buildkit-system/github`."""
    settings: OIDC
    audience: str
    """What tokens must be made for."""
    scope: Scope = EVERYWHERE
    granted: tuple[str, ...] = ()
    """Patterns of pools that it grants to all its callers."""
    refusal: str = ""
    """Why its tokens must not be accepted; empty if they may."""


def trusted_issuers(
    configs: Iterable[OIDCConfig], pools: Iterable[Pool], system_namespace: str, audience: str = AUDIENCE
) -> list[TrustedIssuer]:
    """All configurations of issuers: those in BuildKitOIDCConfig objects and those in pools.

    Args:
        configs: The objects. Those that are not enabled are left out.
        pools: All pools.
        system_namespace: The appliance's namespace. A configuration there is valid for every pool.
        audience: What tokens must be made for, where a configuration names no audience.
    """
    found = [
        TrustedIssuer(
            source=f"{OIDCConfig.KIND} {config.key}",
            settings=config.spec,
            audience=config.spec.audience or audience,
            scope=EVERYWHERE if config.key.namespace == system_namespace else Scope(config.key.namespace),
            granted=config.spec.pools,
            refusal=config.spec.rejection_reason or "",
        )
        for config in configs
        if config.spec.enabled
    ]
    found += [
        TrustedIssuer(
            source=f"{Pool.KIND} {pool.key}",
            settings=own,
            audience=own.audience or audience,
            scope=Scope(*pool.key),
            refusal=own.rejection_reason or "",
        )
        for pool in pools
        if pool.spec.auth.methods  # a shortcut: most pools have none, and this runs for every request
        for own in pool.spec.auth.oidc
    ]
    return found


class OidcAuthenticator:
    """Identifies the holders of ID tokens.

    Args:
        issuers: Has the issuers' keys.
        trusted: Returns the current configurations.
        now: The clock.
        leeway: Seconds by which the clock of an issuer may differ from it.
    """

    def __init__(
        self,
        issuers: IssuerKeys,
        trusted: Callable[[], Iterable[TrustedIssuer]],
        now: Callable[[], datetime],
        leeway: float = LEEWAY,
    ) -> None:
        self._issuers = issuers
        self._trusted = trusted
        self._now = now
        self._leeway = leeway

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:  # noqa: ARG002
        """See Authenticator. Returns one verdict for each configuration of the token's issuer.

        Checks that need no key come first. So the issuer is not asked because of a token that has expired or is for
        another audience, and such a token is refused even while the issuer cannot be reached. Conditions are checked,
        and mentioned, only after the signature was verified.
        """
        if not looks_like_one(bearer):
            return ()
        try:
            token = parse(bearer)
        except Unauthenticated as error:
            return (Verdict(_SOURCE, refusal=error.message),)
        asked = [one for one in self._trusted() if one.settings.issuer == token.claims.get("iss")]
        if not asked:
            return _unknown(token)
        refusals = [one.refusal or self._claims_refusal(token, one) for one in asked]
        if not all(refusals):
            unsigned = await self._signature_refusal(token, asked[0].settings.issuer)
            refusals = [refusal or unsigned for refusal in refusals]
        claims = selected(token.claims, named_claims(one.settings for one in asked))
        return tuple(_verdict(token, one, refusal, claims) for one, refusal in zip(asked, refusals, strict=True))

    async def recall(self, caller: RememberedCaller, pool: Pool) -> tuple[Verdict, ...]:
        """See Authenticator. Returns one verdict for each of today's configurations of the issuer.

        The issuer is not asked: the token was verified when the lease was made, and is not remembered.
        """
        if caller.method is not CallerMethod.OIDC:
            return ()
        asked = [
            one for one in self._trusted() if one.settings.issuer == caller.issuer and one.scope.covers(pool.key)
        ]
        if not asked:
            return (Verdict(_SOURCE, refusal=f"its issuer {shown(caller.issuer)} is not configured here any more"),)
        claims = claims_of(caller)
        return tuple(_recalled(claims, one) for one in asked)

    def _claims_refusal(self, token: Token, one: TrustedIssuer) -> str:
        try:
            verify_claims(
                token.claims,
                issuer=one.settings.issuer,
                audience=one.audience,
                client_id=one.settings.client_id,
                now=self._now(),
                leeway=self._leeway,
            )
        except Unauthenticated as error:
            return error.message
        return ""

    async def _signature_refusal(self, token: Token, issuer: str) -> str:
        try:
            verify_signature(token, await self._issuers.key(issuer, token.kid, token.alg))
        except Unauthenticated as error:
            return error.message
        return ""


def _unknown(token: Token) -> tuple[Verdict, ...]:
    subject, issuer = token.claims.get("sub"), shown(token.claims.get("iss"))
    if isinstance(subject, str) and subject.startswith(_SERVICE_ACCOUNT):
        return ()  # of a Kubernetes cluster: another authenticator may accept it
    return (Verdict(_SOURCE, refusal=f"its issuer {issuer} (iss) is not configured here"),)


def _verdict(token: Token, one: TrustedIssuer, refusal: str, named: Mapping[str, object]) -> Verdict:
    if refusal:
        return Verdict(one.source, refusal=refusal)
    try:
        identity = identify(token.claims, one.settings, source=one.source, scope=one.scope, granted=one.granted)
    except Unauthenticated as error:
        return Verdict(one.source, refusal=error.message, genuine=True)
    return Verdict(one.source, replace(identity, method=CallerMethod.OIDC, claims=named))


def _recalled(claims: Mapping[str, object], one: TrustedIssuer) -> Verdict:
    """The verdict of a configuration on remembered claims. A claim that nothing named before is missing there."""
    if one.refusal:
        return Verdict(one.source, refusal=one.refusal)
    try:
        verify_audience(claims, one.audience, one.settings.client_id)
        identity = identify(claims, one.settings, source=one.source, scope=one.scope, granted=one.granted)
    except Unauthenticated as error:
        refusal = f"{one.source}: {error.message} (as the lease remembers the token)"
        return Verdict(one.source, refusal=refusal, genuine=True)
    return Verdict(one.source, replace(identity, method=CallerMethod.OIDC, claims=claims))
