"""The contents of two Secrets in a cluster: the CAs of the appliance, and the certificates of a pool's gateway.

Bytes in, bytes out; other modules read and write the Secrets. A missing or damaged CA is an error and is never
replaced (rule 7, docs/rules.md#r7). Only a gateway's certificates may be issued again at any time.
"""

from __future__ import annotations

import secrets as random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Self

from bkpool.core.errors import HostFault
from bkpool.core.tokens import TOKEN_KEY_BYTES
from bkpool.pki.authority import SERVER_LIFE, Authority, expires_at, is_for_names, key_belongs_to, renew_at
from bkpool.pki.names import CertificateNames

CA_CERT, CA_KEY, TOKEN_KEY = "ca.crt", "ca.key", "token.key"
BACKEND_CA_CERT, BACKEND_CA_KEY = "backend-ca.crt", "backend-ca.key"
TLS_CERT, TLS_KEY = "tls.crt", "tls.key"
DIALLER_CERT, DIALLER_KEY = "backend.crt", "backend.key"


@dataclass(frozen=True, slots=True)
class ClusterSecrets:
    """The keys from which all certificates and tokens of an appliance in a cluster are made."""

    authority: Authority
    """Issues the server certificates of gateways and the client certificates of leases."""
    token_key: bytes = field(repr=False)
    backend: Authority
    """The backend CA: issues the certificates between gateways and workers. It is a separate CA, so that no client
    certificate of a lease is accepted by a worker."""

    @classmethod
    def create(cls, now: datetime) -> Self:
        """Creates new CAs and a new key."""
        authority = Authority.create(now)
        return cls(authority, random.token_bytes(TOKEN_KEY_BYTES), Authority.create(now, name="bkpool backend CA"))

    def to_data(self) -> dict[str, bytes]:
        """The data of a Secret, before base64 encoding."""
        return {
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
        return cls(authority, token_key, backend)


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


def gateway_bundle(
    secrets: ClusterSecrets,
    names: CertificateNames,
    gateway_name: str,
    now: datetime,
    life: timedelta = SERVER_LIFE,
) -> dict[str, bytes]:
    """The certificates that a pool's gateway needs for its clients and for workers, as the data of its Secret.

    Args:
        secrets: The CAs.
        names: The names and addresses by which clients reach the gateway.
        gateway_name: The gateway's name in the certificate for workers, in ASCII.
        now: The start of the validity.
        life: How long they are valid.

    Raises:
        HostFault: `AuthorityExpired`.
    """
    server = secrets.authority.issue_server(names.dns, names.ips, now, now + life)
    dialler = secrets.backend.issue_dialler(gateway_name, now, now + life)
    return {
        CA_CERT: secrets.authority.cert_pem,
        TLS_CERT: server.cert_pem,
        TLS_KEY: server.key_pem or b"",
        BACKEND_CA_CERT: secrets.backend.cert_pem,
        DIALLER_CERT: dialler.cert_pem,
        DIALLER_KEY: dialler.key_pem or b"",
    }


def bundle_renew_at(data: Mapping[str, bytes]) -> datetime:
    """When a gateway's certificates should be issued again: when the first of the two is due.

    Raises:
        KeyError, ValueError: A certificate is missing or not readable.
    """
    return min(_renew_at(data[TLS_CERT], data[CA_CERT]), _renew_at(data[DIALLER_CERT], data[BACKEND_CA_CERT]))


def bundle_fits(
    data: Mapping[str, bytes], secrets: ClusterSecrets, names: CertificateNames | None, now: datetime
) -> bool:
    """Whether a gateway's certificates can be used further.

    They must be complete, issued by these CAs, for exactly these names (None: for any), and not yet due for renewal.
    """
    try:
        return (
            (data[CA_CERT], data[BACKEND_CA_CERT]) == (secrets.authority.cert_pem, secrets.backend.cert_pem)
            and secrets.authority.issued(data[TLS_CERT])
            and secrets.backend.issued(data[DIALLER_CERT])
            and key_belongs_to(data[TLS_CERT], data[TLS_KEY])
            and key_belongs_to(data[DIALLER_CERT], data[DIALLER_KEY])
            and (names is None or is_for_names(data[TLS_CERT], names.dns, names.ips))
            and now < bundle_renew_at(data)
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
