"""Callers with a token of an OIDC issuer: which configurations believe it, and what each says of the caller.

A token is judged by every configuration of its issuer by itself, since they may differ in audience, conditions and
pools. Nothing of a token is kept, and none is ever sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from bkpool.core.auth import OIDC, OIDCConfig
from bkpool.core.errors import Unauthenticated
from bkpool.core.pool import Pool
from bkpool.identity import EVERYWHERE, Scope, Verdict
from bkpool.identity.claims import identify
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.jwt import Token, looks_like_one, parse, shown, verify_claims, verify_signature

_SOURCE = "OIDC"
_SERVICE_ACCOUNT = "system:serviceaccount:"


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    """One configuration of an issuer, and what it counts for."""

    source: str
    """Where it is written, for people: `BuildKitOIDCConfig buildkit-system/github`."""
    settings: OIDC
    scope: Scope = EVERYWHERE
    granted: tuple[str, ...] = ()
    """Patterns of pools that all its callers may use."""
    refusal: str = ""
    """Why it must not be believed as it is written."""


def trusted_issuers(
    configs: Iterable[OIDCConfig], pools: Iterable[Pool], system_namespace: str
) -> list[TrustedIssuer]:
    """All configurations of issuers that are there, in objects of their own and in pools.

    Args:
        configs: Objects; those that are not enabled are left out.
        pools: All pools.
        system_namespace: The appliance's own: what is configured there counts for every pool.
    """
    found = [
        TrustedIssuer(
            source=f"{OIDCConfig.KIND} {config.key}",
            settings=config.spec,
            scope=EVERYWHERE if config.key.namespace == system_namespace else Scope(config.key.namespace),
            granted=config.spec.pools,
            refusal=config.spec.refusal or "",
        )
        for config in configs
        if config.spec.enabled
    ]
    found += [
        TrustedIssuer(f"{Pool.KIND} {pool.key}", own, Scope(*pool.key), refusal=own.refusal or "")
        for pool in pools
        if pool.spec.auth.methods  # most have none, and this is asked with every request
        for own in pool.spec.auth.oidc
    ]
    return found


class OidcAuthenticator:
    """Knows the holders of ID tokens.

    Args:
        issuers: Their keys.
        trusted: The configurations as of any moment.
        now: The clock.
    """

    def __init__(
        self, issuers: IssuerKeys, trusted: Callable[[], Iterable[TrustedIssuer]], now: Callable[[], datetime]
    ) -> None:
        self._issuers = issuers
        self._trusted = trusted
        self._now = now

    async def authenticate(self, bearer: str) -> tuple[Verdict, ...]:
        """See Authenticator: a verdict of each configuration of the token's issuer.

        What needs no key is judged before the issuer is asked: it is not troubled for a token that has expired or is
        not for us, and such a token is refused also while the issuer is away. Conditions are looked at, and told,
        only when the signature is right.
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
        refusals = [one.refusal or self._unfit(token, one.settings) for one in asked]
        if not all(refusals):
            forged = await self._forged(token, asked[0].settings.issuer)
            refusals = [refusal or forged for refusal in refusals]
        return tuple(_verdict(token, one, refusal) for one, refusal in zip(asked, refusals, strict=True))

    def _unfit(self, token: Token, settings: OIDC) -> str:
        try:
            verify_claims(
                token.claims,
                issuer=settings.issuer,
                audience=settings.audience,
                client_id=settings.client_id,
                now=self._now(),
            )
        except Unauthenticated as error:
            return error.message
        return ""

    async def _forged(self, token: Token, issuer: str) -> str:
        try:
            verify_signature(token, await self._issuers.key(issuer, token.kid, token.alg))
        except Unauthenticated as error:
            return error.message
        return ""


def _unknown(token: Token) -> tuple[Verdict, ...]:
    subject, issuer = token.claims.get("sub"), shown(token.claims.get("iss"))
    if isinstance(subject, str) and subject.startswith(_SERVICE_ACCOUNT):
        return ()  # a Kubernetes cluster's: others here may know it
    return (Verdict(_SOURCE, refusal=f"no issuer known here made this token (iss {issuer})"),)


def _verdict(token: Token, one: TrustedIssuer, refusal: str) -> Verdict:
    if refusal:
        return Verdict(one.source, refusal=refusal)
    try:
        identity = identify(token.claims, one.settings, source=one.source, scope=one.scope, granted=one.granted)
    except Unauthenticated as error:
        return Verdict(one.source, refusal=error.message, genuine=True)
    return Verdict(one.source, identity)
