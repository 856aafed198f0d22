"""Where the authority and the token key are kept: one directory, made whole or not at all.

What cannot be read is an error, never a reason to make a new one: a new authority would silently end every lease
(DESIGN rule 7). Only the gateway's own certificate may be issued again at any time.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from bkpool.core.errors import HostFault
from bkpool.core.tokens import TOKEN_KEY_BYTES
from bkpool.home.files import (
    as_host_fault,
    private_directory,
    read_private,
    sync_directory,
    unreadable,
    write_private,
)
from bkpool.pki.authority import SERVER_LIFE, Authority, key_belongs_to, renew_at, renewal_due
from bkpool.pki.bundle import CA_CERT, CA_KEY, TOKEN_KEY
from bkpool.pki.names import CertificateNames

log = structlog.get_logger(__name__)

SERVER_CERT, SERVER_KEY = "gateway.crt", "gateway.key"


@dataclass(frozen=True, slots=True)
class LocalSecrets:
    """What every certificate and token comes from."""

    authority: Authority
    token_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """The gateway's certificate as files, since ssl.SSLContext.load_cert_chain reads nothing else."""

    cert_file: Path
    key_file: Path
    renew_at: datetime


def load_or_create(directory: Path, now: datetime) -> LocalSecrets:
    """Reads the secrets; makes them only where there is no directory at all. The caller holds the home's lock.

    Raises:
        HostFault: `Unreadable` (a file is missing, damaged, open to others or another's), `Permission`, `DiskFull`.
    """
    if not os.path.lexists(directory):
        _create(directory, now)
    private_directory(directory)
    hint = (
        f"Restore it from a backup. Only where that is lost: bkpool down, then move {directory} away to begin anew; "
        "every certificate handed out so far then stops working."
    )
    cert, key, token_key = (read_private(directory / name, hint=hint) for name in (CA_CERT, CA_KEY, TOKEN_KEY))
    if len(token_key) != TOKEN_KEY_BYTES:
        raise unreadable(directory / TOKEN_KEY, f"has {len(token_key)} bytes instead of {TOKEN_KEY_BYTES}", hint=hint)
    try:
        return LocalSecrets(Authority(cert, key), token_key)
    except ValueError as error:
        raise unreadable(directory, f"{CA_CERT} and {CA_KEY} cannot be used: {error}", hint=hint) from None


def server_certificate(
    directory: Path, authority: Authority, names: CertificateNames, now: datetime
) -> ServerCertificate:
    """The gateway's certificate for these names, as kept, or issued again where that is due or it cannot be used.

    Raises:
        HostFault: `AuthorityExpired`, `DiskFull`, `Permission`.
    """
    cert_file, key_file = directory / SERVER_CERT, directory / SERVER_KEY
    kept = _kept(cert_file, key_file, authority, names, now)
    if kept is not None:
        return ServerCertificate(cert_file, key_file, renew_at(kept))
    leaf = authority.issue_server(names.dns, names.ips, now, now + SERVER_LIFE)
    write_private(key_file, leaf.key_pem or b"")
    write_private(cert_file, leaf.cert_pem)
    log.info("pki.server_certificate_issued", file=str(cert_file), names=[*names.dns, *map(str, names.ips)])
    # What ends with the authority may be due again at once: it is looked at daily, not without end.
    return ServerCertificate(cert_file, key_file, max(renew_at(leaf.cert_pem), now + timedelta(days=1)))


def _create(directory: Path, now: datetime) -> None:
    """Builds everything beside its place and moves it there in one step: a crash leaves all or nothing."""
    draft = directory.with_name(f"{directory.name}.new")
    with as_host_fault(draft):
        if draft.exists():
            shutil.rmtree(draft)
    private_directory(draft)
    authority = Authority.create(now)
    write_private(draft / CA_CERT, authority.cert_pem)
    write_private(draft / CA_KEY, authority.key_pem)
    write_private(draft / TOKEN_KEY, secrets.token_bytes(TOKEN_KEY_BYTES))
    with as_host_fault(directory):
        draft.rename(directory)
        sync_directory(directory.parent)
    log.info("pki.authority_created", directory=str(directory), ends=authority.not_after.isoformat())


def _kept(
    cert_file: Path, key_file: Path, authority: Authority, names: CertificateNames, now: datetime
) -> bytes | None:
    """The certificate in these files if it can go on being used."""
    try:
        cert, key = read_private(cert_file), read_private(key_file)
        usable = authority.issued(cert) and key_belongs_to(cert, key)
        return cert if usable and not renewal_due(cert, now, names.dns, names.ips) else None
    except (HostFault, ValueError):
        return None
