"""Downloads a release, and believes it only by its digest.

The digest comes from the package's own table, else from the release's file of digests; without one nothing is
downloaded. Only https, or http on loopback; sizes, times and redirects are bounded; the proxy variables are honoured.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import json
import os
import re
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.toolchain.table import DIGESTS, Release, Tool

GITHUB = "https://github.com"
UNREACHABLE = "Unreachable"
"""Code of the fault when no connection came about: asking the same host for the next file is of no use."""

_MOST_ASSET = 512 << 20  # bytes: five times the largest asset of today (buildkit's archive)
_MOST_SUMS = 16 << 20  # bytes: a provenance statement carries its whole build definition
_MOST_REDIRECTS = 5  # GitHub needs one
_SILENCE = 15.0  # seconds without a byte, connecting included
_DEADLINE = 900.0  # seconds for one file: 100 MB at 1 Mbit/s
_CHUNK = 256 << 10

Report = Callable[[str, float | None], None]


def fetch(release: Release, base: str, work: Path, report: Report) -> dict[Tool, Path]:
    """Downloads a release into a directory.

    Args:
        release: Which.
        base: The address before `/owner/name/releases/…`.
        work: A directory of our own.
        report: Told what is going on, and how much of it is done.

    Returns:
        The binaries, verified and unpacked.

    Raises:
        HostFault: It cannot be reached, or is not to be trusted; the message says which.
        InvalidInput: The base is not an address that may be used.
    """
    if not _allowed(base):
        raise InvalidInput(
            f"BKPOOL_MIRROR: {base!r} is neither an https address nor http on loopback",
            hint="Give an https address that has the releases as https://github.com has them, or unset it.",
            field="BKPOOL_MIRROR",
        )
    machine = os.uname().machine
    asset, sums = release.fill(release.asset, machine), release.fill(release.sums, machine)
    if asset is None or sums is None:
        raise HostFault(f"there is no {release.name} release for {machine} that this bkpool knows")
    files = f"{base.rstrip('/')}/{release.repository}/releases/download/v{release.version}"
    report(f"asking for {release.name} {release.version} at {urllib.parse.urlsplit(base).hostname}", None)
    wanted = DIGESTS.get(f"{release.name}/{asset}") or _published(f"{files}/{sums}", asset)
    archive = work / "asset"
    with archive.open("wb") as out:
        got = _get(f"{files}/{asset}", out, _MOST_ASSET, lambda done: report(f"downloading {asset}", done))
    if got != wanted:
        raise HostFault(f"{asset} as downloaded has the SHA-256 {got}, it should have {wanted}: not used")
    return {tool: _unpack(archive, source.member, work / tool) for tool, source in release.tools.items()}


def digest_in(text: bytes, asset: str) -> str | None:
    """The SHA-256 of an asset by a file of digests: sha256sum's lines, or an in-toto statement's subjects.

    None if it does not name the asset, or names it with more than one digest.
    """
    found = {digest for name, digest in _entries(text) if PurePosixPath(name).name == asset}
    return found.pop() if len(found) == 1 else None


def _entries(text: bytes) -> list[tuple[str, str]]:
    if not text.lstrip().startswith(b"{"):
        lines = re.findall(r"^([0-9a-f]{64})[ \t]+\*?(\S+)[ \t\r]*$", text.decode(errors="replace"), re.MULTILINE)
        return [(name, digest) for digest, name in lines]
    try:
        return [(str(subject["name"]), str(subject["digest"]["sha256"])) for subject in json.loads(text)["subject"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _published(url: str, asset: str) -> str:
    text = io.BytesIO()
    _get(url, text, _MOST_SUMS, lambda _done: None)
    digest = digest_in(text.getvalue(), asset)
    if digest is None:
        raise HostFault(f"{url} has no digest for {asset}: not downloaded")
    return digest


def _get(url: str, out: BinaryIO, most: int, report: Callable[[float | None], None]) -> str:
    """Writes what is at an address to a file and returns its SHA-256."""
    try:
        with _opener(url).open(url, timeout=_SILENCE) as answer:
            return _copy(answer, url, out, most, report)
    except urllib.error.HTTPError as error:
        error.close()
        raise HostFault(f"{url} cannot be had: HTTP {error.code} {error.reason}", hint=_HINT) from None
    except urllib.error.URLError as error:
        raise HostFault(f"{url} cannot be reached: {error.reason}", hint=_HINT, code=UNREACHABLE) from None
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise HostFault(f"{url} broke off: {str(error) or type(error).__name__}", hint=_HINT) from None


_HINT = "Point BKPOOL_MIRROR to a place that has the releases as https://github.com has them."


def _copy(
    answer: http.client.HTTPResponse, url: str, out: BinaryIO, most: int, report: Callable[[float | None], None]
) -> str:
    length = answer.length  # what Content-Length promised, if anything did
    deadline = time.monotonic() + _DEADLINE
    digest, size, told = hashlib.sha256(), 0, -1
    while chunk := answer.read1(_CHUNK):
        digest.update(chunk)
        out.write(chunk)
        size += len(chunk)
        if size > most:
            raise HostFault(f"{url} is larger than {most >> 20} MiB: not used")
        if time.monotonic() > deadline:
            raise HostFault(f"{url} took longer than {_DEADLINE:.0f} s: given up", hint=_HINT)
        percent = 100 * size // length if length else 0
        if percent != told:
            told = percent
            report(size / length if length else None)
    if length is not None and size != length:
        raise HostFault(f"{url} broke off after {size} of {length} bytes", hint=_HINT)
    return digest.hexdigest()


def _unpack(archive: Path, member: str, target: Path) -> Path:
    if not member:
        return archive.rename(target)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            info = tar.getmember(member)
            source: IO[bytes] | None = tar.extractfile(info) if info.isreg() else None
            if source is None or info.size > _MOST_ASSET:
                raise HostFault(f"{member} in the downloaded archive is no file of a sensible size")
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
    except (KeyError, EOFError, tarfile.TarError, zlib.error) as error:
        raise HostFault(f"the downloaded archive has no {member}: {error}") from None
    return target


def _opener(url: str) -> urllib.request.OpenerDirector:
    loopback = _is_loopback(urllib.parse.urlsplit(url).hostname)
    proxies = [urllib.request.ProxyHandler({})] if loopback else []
    opener = urllib.request.build_opener(_Redirects, *proxies)
    opener.addheaders = [("User-Agent", "bkpool")]
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _MOST_REDIRECTS

    def redirect_request(  # noqa: PLR0917 - the standard library's signature
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        # Nothing that was asked for under TLS may come without it, not even from loopback.
        if not _allowed(newurl) or (req.type == "https" and not newurl.startswith("https:")):
            fp.close()
            raise HostFault(f"{req.full_url} redirects to {newurl}, which is not https: not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _allowed(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host)))


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
