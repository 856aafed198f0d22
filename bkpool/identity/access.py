"""Who a request comes from, and what they may use.

One header in, one Identity out. A credential is never logged, kept or put into an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bkpool.core.errors import Forbidden, Unauthenticated
from bkpool.core.names import Key
from bkpool.identity import Authenticator, Identity

_LONGEST = 8190  # characters: what aiohttp and nginx accept of one header line; a token of CI's has about 1500
_BEARER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")  # RFC 6750 2.1, with the b64token of RFC 7235
_HINT = (
    "Send Authorization: Bearer <token>. On the machine of the appliance the token is in $BKPOOL_HOME/admin.token, "
    "and bkpool finds it by itself; elsewhere set BKCTL_TOKEN to it."
)


async def authenticate(authenticators: Iterable[Authenticator], authorization: Sequence[str]) -> Identity:
    """Whom the caller is, by the first authenticator that knows the token.

    Args:
        authenticators: The ways of knowing a caller, in order.
        authorization: Every Authorization header of the request (`headers.getall("Authorization", [])`).

    Raises:
        Unauthenticated: There is not exactly one bearer token, or nobody knows it.
    """
    token = bearer_token(authorization)
    for authenticator in authenticators:
        identity = await authenticator.authenticate(token)
        if identity is not None:
            return identity
    raise Unauthenticated("The bearer token is not known here, or no longer valid", hint=_HINT)


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
    match = _BEARER.fullmatch(header) if len(header) <= _LONGEST else None
    if match is None:
        raise Unauthenticated("The Authorization header is not a bearer token", hint=_HINT)
    return match[1]


def may_use(identity: Identity, pool: Key) -> None:
    """Whether this caller may lease workers of this pool; returns if so.

    Raises:
        Forbidden: They may not.
    """
    if not identity.admin:
        raise Forbidden(
            f"{identity.name} may not use pool {pool}",
            hint="Ask whoever runs this appliance; so far only its admin token may use pools.",
        )
