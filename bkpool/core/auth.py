"""Who may use a pool, as objects say it: BuildKitOIDCConfig, and `spec.auth` of a pool.

Only the shape and what is wrong with it; who a caller is and what he may do is judged in `identity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from bkpool.core.names import LOOPBACK
from bkpool.core.resource import Condition, Model, Resource
from bkpool.core.wildcards import says_nothing

PUBLIC_ISSUERS: frozenset[str] = frozenset(
    {
        "https://token.actions.githubusercontent.com",
        "https://gitlab.com",
        "https://accounts.google.com",
        "https://agent.buildkite.com",
        "https://oidc.codefresh.io",
        "https://app.terraform.io",
        "https://oauth2.sigstore.dev/auth",
        "https://login.microsoftonline.com/common/v2.0",
        "https://login.microsoftonline.com/organizations/v2.0",
        "https://login.microsoftonline.com/consumers/v2.0",
        "https://login.microsoftonline.com/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0",
    }
)
"""Issuers that make tokens for the whole world, by their own documentation: an account there is enough."""

RESERVED = ("system:", "group:", "pool:")
"""What no user of an OIDC issuer may be called: rules and Kubernetes mean others by names that begin so."""

_SAME_FOR_ALL = frozenset({"iss", "aud", "exp", "iat", "nbf", "azp", "jti"})
"""Claims that tell nobody apart."""

Pattern = Annotated[StrictStr, Field(min_length=1, max_length=512)]
ClaimName = Annotated[StrictStr, Field(min_length=1, max_length=256)]


def check_url(url: str) -> str:
    """The URL, if keys may be fetched from there: https, or http on loopback.

    Raises:
        ValueError: It is not.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if not host or parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError("write https://host/path, without user, query and fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK):
        raise ValueError("must begin with https:// (http only on loopback)")
    return url


IssuerUrl = Annotated[StrictStr, Field(min_length=1, max_length=512), AfterValidator(check_url)]

# --- OIDC -----------------------------------------------------------------------------------------------------------


class ClaimsMapping(Model):
    """Which claims say what. A claim within others is written with dots (`kubernetes.io.namespace`)."""

    user: ClaimName = "sub"
    pools: ClaimName | None = None
    """Names of pools, in a text or a list; taken literally."""
    groups: ClaimName | None = None


class ClaimCondition(Model):
    """What a claim must be: one of the values, or fit one of the patterns. A list must have such a member."""

    claim: ClaimName
    values: tuple[StrictStr | StrictBool | StrictInt, ...] = ()
    patterns: tuple[Pattern, ...] = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.values and not self.patterns:
            raise ValueError("neither values nor patterns are given")
        return self

    @property
    def singles_out(self) -> bool:
        """Whether a token of somebody else's could ever fail it."""
        return self.claim not in _SAME_FOR_ALL and not any(says_nothing(pattern) for pattern in self.patterns)


class OIDC(Model):
    """One issuer whose tokens are believed, and for whom."""

    issuer: IssuerUrl
    audience: Annotated[StrictStr, Field(min_length=1, max_length=512)]
    claims_mapping: ClaimsMapping = ClaimsMapping()
    conditions: tuple[ClaimCondition, ...] = ()
    """All must hold."""
    tenant_claim: ClaimName | None = None
    """Which claim says whose caches are whose; None: the mapped user."""
    client_id: Annotated[StrictStr | None, Field(alias="clientID")] = None
    """What `azp` may be, where it is not the audience."""

    @property
    def refusal(self) -> str | None:
        """Why this must not be believed as it is written; None if it may."""
        if self.issuer.rstrip("/") in PUBLIC_ISSUERS and not any(c.singles_out for c in self.conditions):
            return (
                f"{self.issuer} makes tokens for the whole world: without a condition that singles yours out, "
                "everybody there would be let in"
            )
        return None


class OIDCConfigSpec(OIDC):
    """An issuer for many pools."""

    enabled: StrictBool = True
    pools: tuple[Pattern, ...] = ()
    """Pools that every caller of this config may use, as `name` or `namespace/name`, where a pool has no rules."""


class OIDCConfigStatus(Model):
    """Whether it works."""

    ready: StrictBool = False
    message: StrictStr = ""
    observed_generation: StrictInt | None = None
    conditions: tuple[Condition, ...] = ()


class OIDCConfig(Resource):
    """An issuer of callers' tokens: for all pools in the appliance's namespace, else for its namespace's."""

    KIND: ClassVar[str] = "BuildKitOIDCConfig"
    PLURAL: ClassVar[str] = "buildkitoidcconfigs"

    kind: Literal["BuildKitOIDCConfig"] = "BuildKitOIDCConfig"
    spec: OIDCConfigSpec
    status: OIDCConfigStatus = OIDCConfigStatus()


# --- spec.auth of a pool --------------------------------------------------------------------------------------------


class MethodType(StrEnum):
    """Ways of knowing a caller."""

    MTLS = "mtls"
    TOKEN = "token"  # noqa: S105 - the name of a method
    OIDC = "oidc"


class MTLS(Model):
    """The gateway always wants a certificate of the lease; there is nothing to set."""

    required: StrictBool = True


class TokenFrom(Model):
    """Where fixed bearer tokens are. Which of the two is read depends on the backend."""

    secret_ref: Annotated[StrictStr, Field(min_length=1, max_length=253)] | None = None
    """A Secret in the pool's namespace."""
    file: Annotated[StrictStr, Field(min_length=1, max_length=4096)] | None = None
    """A private file of the appliance's machine; absolute."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if (self.secret_ref is None) == (self.file is None):
            raise ValueError("give one of secretRef and file")
        if self.file is not None and not self.file.startswith("/"):
            raise ValueError("file must be an absolute path")
        return self


class AuthMethod(Model):
    """One way of knowing a pool's callers."""

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
    """Only a type's name stands for the method, as the older Go controller's examples have it."""
    return {"type": value} if isinstance(value, str) else value


class Rule(Model):
    """These users may use these pools."""

    users: tuple[Pattern, ...] = ()
    """Names; `group:NAME`; `pool:NAME` for what the token says of pools. Patterns all."""
    pools: tuple[Pattern, ...] = ("*",)
    """A rule counts for the pool it stands in, if its name (or namespace/name) is among these."""


class RBAC(Model):
    """Rules of one pool."""

    enabled: StrictBool = True
    """False: whoever is known may use the pool."""
    rules: tuple[Rule, ...] = ()


class Allowance(Model):
    """How much of a pool somebody may have."""

    leases: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    """At once."""
    per_minute: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    """Requests for a lease."""


class AuthLimits(Model):
    """Bounds of requests for leases."""

    identity: Allowance = Allowance()
    """For each caller."""
    pool: Allowance = Allowance()
    """For all together."""


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
        """Where the pool's own tokens are."""
        return (method.token for method in self.methods if method.type is MethodType.TOKEN and method.token)

    @property
    def says_something(self) -> bool:
        """Whether somebody has thought about who may use this pool: then nobody else may."""
        return bool(self.rbac.rules) or any(method.type is not MethodType.MTLS for method in self.methods)
