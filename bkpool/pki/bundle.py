"""The contents of two Secrets in a cluster: the CAs of the appliance, and the certificates of a pool's gateway.

Bytes in, bytes out; other modules read and write the Secrets. A missing or damaged CA is an error and is never
replaced (rule 7, docs/rules.md#r7). Only a gateway's certificates may be issued again at any time.
"""

from __future__ import annotations

import secrets as random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Self

from bkpool.core.errors import HostFault
from bkpool.core.tokens import TOKEN_KEY_BYTES
from bkpool.pki.authority import SERVER_LIFE, Authority, expires_at, is_for_names, key_belongs_to, renew_at
from bkpool.pki.names import CertificateNames
from bkpool.pki.pool_authority import DIALLER_LIFE
from bkpool.pki.rotation import Former

CA_CERT, CA_KEY, TOKEN_KEY = "ca.crt", "ca.key", "token.key"
BACKEND_CA_CERT, BACKEND_CA_KEY = "backend-ca.crt", "backend-ca.key"
FORMER_CA_CERT, FORMER_CA_KEY, ROTATED_AT = "former-ca.crt", "former-ca.key", "rotated-at"
FORMER_BACKEND_CA_CERT, FORMER_BACKEND_CA_KEY = "former-backend-ca.crt", "former-backend-ca.key"
TLS_CERT, TLS_KEY = "tls.crt", "tls.key"
SERVER_ENTRIES = CA_CERT, TLS_CERT, TLS_KEY
WORKER_CA, DIALLER_CERT, DIALLER_KEY = "worker-ca.crt", "dialler.crt", "dialler.key"
FORMER_WORKER_CA, FORMER_DIALLER_CERT, FORMER_DIALLER_KEY = BACKEND_CA_CERT, "backend.crt", "backend.key"
"""Entries for workers that were made with a former CA. Gateways of older versions read no others."""


@dataclass(frozen=True, slots=True)
class ClusterSecrets:
    """The keys from which all certificates and tokens of an appliance in a cluster are made."""

    authority: Authority
    """Issues the server certificates of gateways and the client certificates of leases."""
    token_key: bytes = field(repr=False)
    backend: Authority
    """The backend CA, from whose key the CA of each pool for its workers follows (`pool_authority`). It is a separate
    CA, so that no client certificate of a lease is accepted by a worker."""

    former: Former | None = None
    """What there was before the last rotation."""

    @classmethod
    def create(cls, now: datetime) -> Self:
        """Creates new CAs and a new key."""
        authority = Authority.create(now)
        return cls(authority, random.token_bytes(TOKEN_KEY_BYTES), Authority.create(now, name="bkpool backend CA"))

    def rotated(self, now: datetime) -> Self:
        """The same with new CAs, and these as the former ones. Tokens stay valid."""
        new = self.create(now)
        former = Former(self.authority, now, self.backend)
        return replace(self, authority=new.authority, backend=new.backend, former=former)

    @property
    def backends(self) -> tuple[Authority, ...]:
        """The backend CA, and after it the one that a rotation has replaced."""
        former = self.former.backend if self.former is not None else None
        return (self.backend,) if former is None else (self.backend, former)

    def to_data(self) -> dict[str, bytes]:
        """The data of a Secret, before base64 encoding."""
        former = {}
        if self.former is not None and self.former.backend is not None:
            former = {
                **former_data(self.former),
                FORMER_BACKEND_CA_CERT: self.former.backend.cert_pem,
                FORMER_BACKEND_CA_KEY: self.former.backend.key_pem,
            }
        return former | {
            CA_CERT: self.authority.cert_pem,
            CA_KEY: self.authority.key_pem,
            TOKEN_KEY: self.token_key,
            BACKEND_CA_CERT: self.backend.cert_pem,
            BACKEND_CA_KEY: self.backend.key_pem,
        }

    @classmethod
    def of_data(cls, data: Mapping[str, bytes], source: str = "Secret bkpool-pki") -> Self:
        """Reads what `to_data` returned.

        Args:
            data: The data of the Secret, decoded from base64.
            source: The name of the Secret, for the error.

        Raises:
            HostFault: `Unreadable`: something is missing or damaged, or a key does not belong to its certificate.
        """
        authority = _authority(data, CA_CERT, CA_KEY, source)
        backend = _authority(data, BACKEND_CA_CERT, BACKEND_CA_KEY, source)
        if key_belongs_to(authority.cert_pem, backend.key_pem):
            raise _unusable(
                source, f"{CA_KEY} and {BACKEND_CA_KEY} are the same key, so clients could act as gateways"
            )
        token_key = _entry(data, TOKEN_KEY, source)
        if len(token_key) != TOKEN_KEY_BYTES:
            raise _unusable(source, f"{TOKEN_KEY} has {len(token_key)} bytes instead of {TOKEN_KEY_BYTES}")
        former = read_former(data, source)
        if former is not None:
            old = _authority(data, FORMER_BACKEND_CA_CERT, FORMER_BACKEND_CA_KEY, source)
            former = replace(former, backend=old)
        return cls(authority, token_key, backend, former)


def former_data(former: Former) -> dict[str, bytes]:
    """What is stored of the former CA, without the backend CA."""
    return {
        FORMER_CA_CERT: former.authority.cert_pem,
        FORMER_CA_KEY: former.authority.key_pem,
        ROTATED_AT: former.rotated_at.isoformat().encode(),
    }


def read_former(data: Mapping[str, bytes], source: str) -> Former | None:
    """Reads what `former_data` returned; None if there was no rotation.

    Args:
        data: The data of a Secret, or of a directory.
        source: Its name, for the error.

    Raises:
        HostFault: `Unreadable`: something is missing or damaged.
    """
    if not {FORMER_CA_CERT, FORMER_CA_KEY, ROTATED_AT} & data.keys():
        return None
    authority = _authority(data, FORMER_CA_CERT, FORMER_CA_KEY, source)
    try:
        rotated_at = datetime.fromisoformat(_entry(data, ROTATED_AT, source).decode("ascii"))
        return Former(authority, rotated_at.astimezone(UTC))
    except (ValueError, OverflowError):
        raise _unusable(source, f"{ROTATED_AT} is not a time") from None


def api_authority_data(now: datetime) -> dict[str, bytes]:
    """The data of the Secret of a new CA for the API's own certificate.

    It is a separate CA, so that no certificate of a gateway is accepted for the API, whatever names are in it.
    """
    authority = Authority.create(now, name="bkpool API CA")
    return {CA_CERT: authority.cert_pem, CA_KEY: authority.key_pem}


def api_authority_of(data: Mapping[str, bytes], others: ClusterSecrets, source: str) -> Authority:
    """Reads what `api_authority_data` returned.

    Args:
        data: The data of the Secret, decoded from base64.
        others: The CAs that it must differ from.
        source: The name of the Secret, for the error.

    Raises:
        HostFault: `Unreadable`: something is missing or damaged, or it has the key of another CA.
    """
    authority = _authority(data, CA_CERT, CA_KEY, source)
    if any(key_belongs_to(other.cert_pem, authority.key_pem) for other in (others.authority, others.backend)):
        raise _unusable(source, f"{CA_KEY} is the key of another CA, so a gateway could act as the API")
    return authority


def gateway_server(
    authority: Authority,
    names: CertificateNames,
    now: datetime,
    life: timedelta = SERVER_LIFE,
    *,
    trusted: bytes | None = None,
) -> dict[str, bytes]:
    """The certificate that a pool's gateway shows its clients, as a part of the data of its Secret.

    Args:
        authority: Signs it.
        names: The names and addresses by which clients reach the gateway.
        now: The start of the validity.
        life: How long it is valid.
        trusted: The CAs of clients' certificates in PEM; None: `authority`.

    Raises:
        HostFault: `AuthorityExpired`.
    """
    leaf = authority.issue_server(names.dns, names.ips, now, now + life)
    return {CA_CERT: trusted or authority.cert_pem, TLS_CERT: leaf.cert_pem, TLS_KEY: leaf.key_pem or b""}


def gateway_diallers(
    authority: Authority, former: Authority | None, gateway_name: str, now: datetime
) -> dict[str, bytes]:
    """The certificates that a pool's gateway shows workers, as the other part.

    Args:
        authority: The pool's backend CA.
        former: The CA of workers that were made before it; None if there are none.
        gateway_name: The gateway's name in these certificates, in ASCII.
        now: The start of the validity.

    Raises:
        HostFault: `AuthorityExpired`.
    """
    data = _dialler(_CURRENT, authority, gateway_name, now)
    return data | (_dialler(_FORMER, former, gateway_name, now) if former is not None else {})


def bundle_renew_at(data: Mapping[str, bytes]) -> datetime:
    """When a gateway's certificates should be issued again: when the first of them is due.

    Raises:
        KeyError, ValueError: A certificate is missing or not readable.
    """
    former = [_FORMER] if FORMER_DIALLER_CERT in data else []
    entries = [SERVER_ENTRIES, _CURRENT, *former]
    return min(_renew_at(data[cert], data[ca]) for ca, cert, _ in entries)


def server_fits(
    data: Mapping[str, bytes],
    authority: Authority,
    names: CertificateNames | None,
    now: datetime,
    *,
    trusted: bytes | None = None,
) -> bool:
    """Whether a gateway's certificate for clients can be used further.

    It must be complete, issued by this CA, for exactly these names (None: for any), and not yet due for renewal. And
    it must be together with exactly the CAs that are trusted, as for `gateway_server`.
    """
    return _fits(SERVER_ENTRIES, data, authority, now, trusted) and (
        names is None or is_for_names(data[TLS_CERT], names.dns, names.ips)
    )


def diallers_fit(data: Mapping[str, bytes], authority: Authority, former: Authority | None, now: datetime) -> bool:
    """Whether a gateway's certificates for workers can be used further, and there are none that it does not need."""
    if former is None:
        return _fits(_CURRENT, data, authority, now) and FORMER_DIALLER_CERT not in data
    return _fits(_CURRENT, data, authority, now) and _fits(_FORMER, data, former, now)


_CURRENT = WORKER_CA, DIALLER_CERT, DIALLER_KEY
_FORMER = FORMER_WORKER_CA, FORMER_DIALLER_CERT, FORMER_DIALLER_KEY


def _dialler(entries: tuple[str, str, str], authority: Authority, name: str, now: datetime) -> dict[str, bytes]:
    leaf = authority.issue_dialler(name, now, now + DIALLER_LIFE)
    return dict(zip(entries, (authority.cert_pem, leaf.cert_pem, leaf.key_pem or b""), strict=True))


def _fits(
    entries: tuple[str, str, str],
    data: Mapping[str, bytes],
    authority: Authority,
    now: datetime,
    trusted: bytes | None = None,
) -> bool:
    try:
        ca, cert, key = (data[name] for name in entries)
        return (
            ca == (trusted or authority.cert_pem)
            and authority.issued(cert)
            and key_belongs_to(cert, key)
            and now < _renew_at(cert, ca)
        )
    except (KeyError, ValueError):
        return False


def _renew_at(cert_pem: bytes, ca_pem: bytes) -> datetime:
    """A certificate capped by its CA's expiry cannot be extended; renewing earlier would loop."""
    end = expires_at(cert_pem)
    return renew_at(cert_pem) if end < expires_at(ca_pem) else end


def _authority(data: Mapping[str, bytes], cert: str, key: str, source: str) -> Authority:
    try:
        return Authority(_entry(data, cert, source), _entry(data, key, source))
    except ValueError as error:
        raise _unusable(source, f"{cert} and {key} cannot be used: {error}") from None


def _entry(data: Mapping[str, bytes], name: str, source: str) -> bytes:
    found = data.get(name)
    if not found:
        raise _unusable(source, f"{name} is missing")
    return found


def _unusable(source: str, why: str) -> HostFault:
    return HostFault(
        f"{source}: {why}",
        hint="Restore it from a backup. Only if there is none: delete it and restart the appliance; all certificates "
        "that were issued before then stop working.",
        code="Unreadable",
    )
