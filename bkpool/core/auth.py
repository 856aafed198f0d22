"""The objects that say who may use a pool: BuildKitOIDCConfig, and `spec.auth` of a pool.

This module has their fields and what is wrong with a value. Who a caller is and what they may do is decided in
`identity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from bkpool.core.public_issuers import lets_strangers_in
from bkpool.core.resource import OBSERVED, Condition, Model, Resource
from bkpool.core.urls import is_protected

RESERVED_PREFIXES = ("system:", "group:", "pool:")
"""The name of an OIDC user may not begin with these, because in rules and in Kubernetes they mean other users."""

Pattern = Annotated[StrictStr, Field(min_length=1, max_length=512)]
ClaimName = Annotated[StrictStr, Field(min_length=1, max_length=256)]


def check_url(url: str) -> str:
    """Returns the URL if keys may be fetched from it: it is https, or http on loopback.

    Raises:
        ValueError: They may not.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if not host or parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError("write https://host/path, without user, query and fragment")
    if not is_protected(parts):
        raise ValueError("must begin with https:// (http only on loopback)")
    return url


IssuerUrl = Annotated[StrictStr, Field(min_length=1, max_length=512), AfterValidator(check_url)]

# --- OIDC -----------------------------------------------------------------------------------------------------------


class ClaimsMapping(Model):
    """Which claims are read for what. A nested claim is written with dots (`kubernetes.io.namespace`)."""

    user: ClaimName = "sub"
    pools: ClaimName | None = None
    """The claim with names of pools, as a string or a list. Wildcards in it have no meaning."""
    groups: ClaimName | None = None


class ClaimCondition(Model):
    """The claim must equal one of the values or match one of the patterns. In a list, one member must."""

    claim: ClaimName
    values: tuple[StrictStr | StrictBool | StrictInt, ...] = ()
    patterns: tuple[Pattern, ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.values and not self.patterns:
            raise ValueError("neither values nor patterns are given")
        return self


class OIDC(Model):
    """One issuer whose tokens are accepted, and under which conditions."""

    issuer: IssuerUrl
    audience: Annotated[StrictStr | None, Field(min_length=1, max_length=512)] = None
    """A value that `aud` must have; None: the appliance's own (`identity.audience`)."""
    claims_mapping: ClaimsMapping = ClaimsMapping()
    conditions: tuple[ClaimCondition, ...] = ()
    """A token must meet all of them."""
    tenant_claim: ClaimName | None = None
    """The claim with the tenant, who owns the caches; None: the tenant is the user."""
    client_id: Annotated[StrictStr | None, Field(alias="clientID")] = None
    """The accepted value of the claim `azp`, if it is not the audience."""

    @property
    def rejection_reason(self) -> str | None:
        """Why no token is accepted with these settings; None if tokens are accepted."""
        return lets_strangers_in(self.issuer, self.conditions)


class OIDCConfigSpec(OIDC):
    """An issuer whose tokens are accepted for many pools."""

    enabled: StrictBool = True
    pools: tuple[Pattern, ...] = ()
    """Pools without rules that every caller with such a token may use, as `name` or `namespace/name`."""


class OIDCConfigStatus(Model):
    """Whether tokens of the issuer are accepted."""

    ready: StrictBool = False
    message: StrictStr = ""
    observed_generation: StrictInt | None = None
    conditions: tuple[Condition, ...] = ()


class OIDCConfig(Resource):
    """An issuer of callers' tokens. In the appliance's namespace it is for all pools, else for those beside it."""

    KIND: ClassVar[str] = "BuildKitOIDCConfig"
    PLURAL: ClassVar[str] = "buildkitoidcconfigs"

    kind: Literal["BuildKitOIDCConfig"] = "BuildKitOIDCConfig"
    spec: OIDCConfigSpec
    status: Annotated[OIDCConfigStatus, OBSERVED] = OIDCConfigStatus()


# --- spec.auth of a pool --------------------------------------------------------------------------------------------


class MethodType(StrEnum):
    """Ways to authenticate a caller."""

    MTLS = "mtls"
    TOKEN = "token"  # noqa: S105 - the name of a method
    OIDC = "oidc"


class MTLS(Model):
    """The gateway always requires the certificate of the lease, so there is nothing to set."""

    required: StrictBool = True


class TokenFrom(Model):
    """Where static bearer tokens are. Which of the two is read depends on where the appliance runs."""

    secret_ref: Annotated[StrictStr, Field(min_length=1, max_length=253)] | None = None
    """A Secret in the pool's namespace."""
    file: Annotated[StrictStr, Field(min_length=1, max_length=4096)] | None = None
    """A private file on the appliance's machine, as an absolute path."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if (self.secret_ref is None) == (self.file is None):
            raise ValueError("give one of secretRef and file")
        if self.file is not None and not self.file.startswith("/"):
            raise ValueError("file must be an absolute path")
        return self


class AuthMethod(Model):
    """A method to authenticate the callers of a pool."""

    type: MethodType
    mtls: MTLS | None = None
    token: TokenFrom | None = None
    oidc: OIDC | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type is not MethodType.MTLS and getattr(self, self.type) is None:
            raise ValueError(f"a method of the type {self.type} needs its field {self.type}")
        return self


def _read_method(value: object) -> object:
    """A string stands for a method of that type, as in the examples of the older Go controller."""
    return {"type": value} if isinstance(value, str) else value


class Rule(Model):
    """Lets these users use these pools."""

    users: tuple[Pattern, ...] = ()
    """Names, `group:NAME`, or `pool:NAME` for a pool that the token names. All may have wildcards."""
    pools: tuple[Pattern, ...] = ("*",)
    """The rule has an effect only if its own pool's name (or namespace/name) matches one of these."""


class RBAC(Model):
    """The rules of one pool."""

    enabled: StrictBool = True
    """False: every authenticated caller may use the pool."""
    rules: tuple[Rule, ...] = ()


class Allowance(Model):
    """How many leases and requests are allowed."""

    leases: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    """Leases at the same time."""
    waiters: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    """Requests that wait for a lease at the same time."""
    per_minute: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    """Requests for a lease in one minute."""


class AuthLimits(Model):
    """Limits of leases and of requests for them."""

    identity: Allowance = Allowance()
    """For each caller alone, except for the admin. `core.caller_share` has what holds where a number is not given."""
    pool: Allowance = Allowance()
    """For all callers together."""


class Auth(Model):
    """Who may use the pool."""

    methods: tuple[Annotated[AuthMethod, BeforeValidator(_read_method)], ...] = ()
    rbac: RBAC = RBAC()
    limits: AuthLimits = AuthLimits()

    @property
    def oidc(self) -> Iterator[OIDC]:
        """The pool's own issuers."""
        return (method.oidc for method in self.methods if method.type is MethodType.OIDC and method.oidc)

    @property
    def tokens(self) -> Iterator[TokenFrom]:
        """Where the pool's own static tokens are."""
        return (method.token for method in self.methods if method.type is MethodType.TOKEN and method.token)

    @property
    def restricts_access(self) -> bool:
        """Whether the pool lists its allowed callers, so that all others are refused."""
        return bool(self.rbac.rules) or any(method.type is not MethodType.MTLS for method in self.methods)
