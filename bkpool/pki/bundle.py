"""What clusters keep of the pki in Secrets: the authorities of the appliance, and the certificates of a gateway.

Bytes in, bytes out: who reads and writes the Secrets is elsewhere. What is missing or damaged is an error, never a
reason to make it anew (DESIGN rule 7); only a gateway's certificates may be issued again at any time.
"""

from __future__ import annotations

import secrets as random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
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
    """What every certificate and token of an appliance in a cluster comes from."""

    authority: Authority
    """Of the gateways' server certificates and the leases' client certificates."""
    token_key: bytes = field(repr=False)
    backend: Authority
    """Between gateways and workers only, so that no lease's certificate opens a worker's port."""

    @classmethod
    def create(cls, now: datetime) -> Self:
        """All of it, new."""
        authority = Authority.create(now)
        return cls(authority, random.token_bytes(TOKEN_KEY_BYTES), Authority.create(now, name="bkpool backend CA"))

    def to_data(self) -> dict[str, bytes]:
        """As the data of a Secret, not yet in base64."""
        return {
            CA_CERT: self.authority.cert_pem,
            CA_KEY: self.authority.key_pem,
            TOKEN_KEY: self.token_key,
            BACKEND_CA_CERT: self.backend.cert_pem,
            BACKEND_CA_KEY: self.backend.key_pem,
        }

    @classmethod
    def of_data(cls, data: Mapping[str, bytes], source: str = "Secret bkpool-pki") -> Self:
        """What `to_data` gave.

        Args:
            data: The data of the Secret, out of base64.
            source: Where it is from, for the error.

        Raises:
            HostFault: `Unreadable`: something is missing, damaged, or does not belong together.
        """
        authority = _authority(data, CA_CERT, CA_KEY, source)
        backend = _authority(data, BACKEND_CA_CERT, BACKEND_CA_KEY, source)
        if key_belongs_to(authority.cert_pem, backend.key_pem):
            raise _unusable(source, f"{CA_KEY} and {BACKEND_CA_KEY} are the same, so clients could pose as gateways")
        token_key = _entry(data, TOKEN_KEY, source)
        if len(token_key) != TOKEN_KEY_BYTES:
            raise _unusable(source, f"{TOKEN_KEY} has {len(token_key)} bytes instead of {TOKEN_KEY_BYTES}")
        return cls(authority, token_key, backend)


def gateway_bundle(
    secrets: ClusterSecrets, names: CertificateNames, gateway_name: str, now: datetime
) -> dict[str, bytes]:
    """All that a pool's gateways need to serve clients and to dial workers, as the data of their Secret.

    Args:
        secrets: Who issues it.
        names: What clients call the gateway.
        gateway_name: What workers see of it; in ASCII.
        now: From when it is valid; a year long (SERVER_LIFE).

    Raises:
        HostFault: `AuthorityExpired`.
    """
    server = secrets.authority.issue_server(names.dns, names.ips, now, now + SERVER_LIFE)
    dialler = secrets.backend.issue_dialler(gateway_name, now, now + SERVER_LIFE)
    return {
        CA_CERT: secrets.authority.cert_pem,
        TLS_CERT: server.cert_pem,
        TLS_KEY: server.key_pem or b"",
        BACKEND_CA_CERT: secrets.backend.cert_pem,
        DIALLER_CERT: dialler.cert_pem,
        DIALLER_KEY: dialler.key_pem or b"",
    }


def bundle_renew_at(data: Mapping[str, bytes]) -> datetime:
    """When a gateway's bundle is to be issued again: at the earliest of its two certificates' times.

    Raises:
        KeyError, ValueError: Something of it is missing, or no certificate.
    """
    return min(_renew_at(data[TLS_CERT], data[CA_CERT]), _renew_at(data[DIALLER_CERT], data[BACKEND_CA_CERT]))


def bundle_fits(data: Mapping[str, bytes], secrets: ClusterSecrets, names: CertificateNames, now: datetime) -> bool:
    """Whether a gateway's bundle can go on being used: whole, these authorities', for just these names, not due."""
    try:
        return (
            (data[CA_CERT], data[BACKEND_CA_CERT]) == (secrets.authority.cert_pem, secrets.backend.cert_pem)
            and secrets.authority.issued(data[TLS_CERT])
            and secrets.backend.issued(data[DIALLER_CERT])
            and key_belongs_to(data[TLS_CERT], data[TLS_KEY])
            and key_belongs_to(data[DIALLER_CERT], data[DIALLER_KEY])
            and is_for_names(data[TLS_CERT], names.dns, names.ips)
            and now < bundle_renew_at(data)
        )
    except (KeyError, ValueError):
        return False


def _renew_at(cert_pem: bytes, ca_pem: bytes) -> datetime:
    """What ends with its authority cannot be had any longer: issuing it again sooner would be without end."""
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
        hint="Restore it from a backup. Only where that is lost: delete it and restart the appliance; every "
        "certificate handed out so far then stops working.",
        code="Unreadable",
    )
