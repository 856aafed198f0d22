"""Stores the CA and the token key in one directory, which is created completely or not at all.

A CA or key that cannot be read is an error and is never replaced: a new CA would silently end every lease (rule 7,
docs/rules.md#r7). Only the gateway's own certificate may be issued again at any time.
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
from bkpool.pki.bundle import (
    CA_CERT,
    CA_KEY,
    FORMER_CA_CERT,
    FORMER_CA_KEY,
    ROTATED_AT,
    TOKEN_KEY,
    former_data,
    read_former,
)
from bkpool.pki.names import CertificateNames
from bkpool.pki.rotation import Former

log = structlog.get_logger(__name__)

SERVER_CERT, SERVER_KEY = "gateway.crt", "gateway.key"


@dataclass(frozen=True, slots=True)
class LocalSecrets:
    """The keys from which all certificates and tokens are made."""

    authority: Authority
    token_key: bytes = field(repr=False)
    former: Former | None = None
    """What there was before the last rotation."""


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """The gateway's certificate as files, because ssl.SSLContext.load_cert_chain reads nothing else."""

    cert_file: Path
    key_file: Path
    renew_at: datetime


def load_or_create(directory: Path, now: datetime) -> LocalSecrets:
    """Reads the secrets. Creates them only if the directory does not exist. The caller holds the lock of the home.

    Raises:
        HostFault: `Unreadable` (a file is missing, damaged, open to others or owned by another user), `Permission`,
            `DiskFull`.
    """
    if not os.path.lexists(directory):
        if os.path.lexists(_rotating(directory)):  # a rotation was killed between its last two steps
            _rename(_rotating(directory), directory)
        else:
            _create(directory, now)
    private_directory(directory)
    hint = (
        f"Restore it from a backup. Only if there is none: bkpool down, move {directory} away and start again; "
        "all certificates that were issued before then stop working."
    )
    cert, key, token_key = (read_private(directory / name, hint=hint) for name in (CA_CERT, CA_KEY, TOKEN_KEY))
    if len(token_key) != TOKEN_KEY_BYTES:
        raise unreadable(directory / TOKEN_KEY, f"has {len(token_key)} bytes instead of {TOKEN_KEY_BYTES}", hint=hint)
    stored = [name for name in (FORMER_CA_CERT, FORMER_CA_KEY, ROTATED_AT) if os.path.lexists(directory / name)]
    former = read_former({name: read_private(directory / name, hint=hint) for name in stored}, str(directory))
    try:
        return LocalSecrets(Authority(cert, key), token_key, former)
    except ValueError as error:
        raise unreadable(directory, f"{CA_CERT} and {CA_KEY} cannot be used: {error}", hint=hint) from None


def rotate(directory: Path, now: datetime) -> LocalSecrets:
    """Makes a new CA, and keeps the present one as the former one. The caller holds the lock of the home.

    After a crash the directory is the old one or the new one.

    Raises:
        HostFault: As for `load_or_create`.
    """
    stored = load_or_create(directory, now)
    _remove_leftovers(directory)
    making, before = (directory.with_name(directory.name + end) for end in _LEFTOVERS)
    authority = Authority.create(now)
    files = former_data(Former(stored.authority, now))
    files |= {CA_CERT: authority.cert_pem, CA_KEY: authority.key_pem, TOKEN_KEY: stored.token_key}
    private_directory(making)
    for name, content in files.items():
        write_private(making / name, content)
    _rename(making, _rotating(directory))  # from now on it is complete
    _rename(directory, before)
    _rename(_rotating(directory), directory)
    _remove_leftovers(directory)
    return load_or_create(directory, now)


_LEFTOVERS = ".draft", ".before"
"""What a rotation names its unfinished directory, and the present one until the new one is in place."""


def _remove_leftovers(directory: Path) -> None:
    """Removes the directories of rotations that were completed, or killed before they replaced anything."""
    for leftover in (*(directory.with_name(directory.name + end) for end in _LEFTOVERS), _rotating(directory)):
        if os.path.lexists(leftover):
            with as_host_fault(leftover):
                shutil.rmtree(leftover)


def _rotating(directory: Path) -> Path:
    return directory.with_name(directory.name + ".rotating")


def _rename(source: Path, target: Path) -> None:
    with as_host_fault(source):
        source.rename(target)
        sync_directory(target.parent)


def server_certificate(
    directory: Path, authority: Authority, names: CertificateNames, now: datetime, life: timedelta = SERVER_LIFE
) -> ServerCertificate:
    """The gateway's stored certificate, or a new one if that is due, not for these names, or not usable.

    Args:
        directory: Where it is stored.
        authority: Signs a new one.
        names: The names that it must have.
        now: The current time.
        life: How long a new one is valid.

    Raises:
        HostFault: `AuthorityExpired`, `DiskFull`, `Permission`.
    """
    cert_file, key_file = directory / SERVER_CERT, directory / SERVER_KEY
    stored = _usable_certificate(cert_file, key_file, authority, names, now)
    if stored is not None:
        return ServerCertificate(cert_file, key_file, renew_at(stored))
    leaf = authority.issue_server(names.dns, names.ips, now, now + life)
    write_private(key_file, leaf.key_pem or b"")
    write_private(cert_file, leaf.cert_pem)
    log.info("pki.server_certificate_issued", file=str(cert_file), names=[*names.dns, *map(str, names.ips)])
    # A certificate capped by its CA's expiry may be due again soon. It is then renewed daily at most, not in a loop.
    return ServerCertificate(cert_file, key_file, max(renew_at(leaf.cert_pem), now + timedelta(days=1)))


def _create(directory: Path, now: datetime) -> None:
    """Creates everything in a temporary directory and renames it, so that a crash leaves all or nothing."""
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
    log.info("pki.authority_created", directory=str(directory), expires=authority.not_after.isoformat())


def _usable_certificate(
    cert_file: Path, key_file: Path, authority: Authority, names: CertificateNames, now: datetime
) -> bytes | None:
    """The certificate in these files, if it can be used further; else None."""
    try:
        cert, key = read_private(cert_file), read_private(key_file)
        usable = authority.issued(cert) and key_belongs_to(cert, key)
        return cert if usable and not renewal_due(cert, now, names.dns, names.ips) else None
    except (HostFault, ValueError):
        return None
