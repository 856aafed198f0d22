"""Downloads a release and verifies its digest.

The digest comes from the table in the package, else from the digests file of the release. Without a digest nothing is
downloaded. Only https is used, or http on loopback. Sizes, times and redirects are bounded. Proxy variables apply.
"""

from __future__ import annotations

import hashlib
import http.client
import io
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
from bkpool.core.names import LOOPBACK
from bkpool.core.urls import is_protected
from bkpool.toolchain.progress import ReportStep
from bkpool.toolchain.table import DIGESTS, Release, Tool

GITHUB = "https://github.com"
UNREACHABLE = "Unreachable"
"""Code of the error if the host cannot be reached: then there is no point in asking it for the next file."""

_MAX_ASSET = 512 << 20  # bytes: five times the largest asset today (the archive of buildkit)
_MAX_DIGESTS = 16 << 20  # bytes: a provenance statement contains its whole build definition
_MAX_REDIRECTS = 5  # GitHub needs one
_READ_TIMEOUT = 15.0  # seconds without a byte, including the connect
_DOWNLOAD_TIMEOUT = 900.0  # seconds for one file: 100 MB at 1 Mbit/s
_CHUNK = 256 << 10


def fetch(release: Release, base: str, work: Path, report: ReportStep) -> dict[Tool, Path]:
    """Downloads a release into a directory.

    Args:
        release: The release.
        base: The part of the address before `/owner/name/releases/…`.
        work: A private directory.
        report: Called with each step and the fraction that is done.

    Returns:
        The binaries, verified and unpacked.

    Raises:
        HostFault: It cannot be reached, or its digest is wrong; the message says which.
        InvalidInput: The base is not an allowed address.
    """
    if not _is_allowed(base):
        raise InvalidInput(
            f"BKPOOL_MIRROR: {base!r} is neither an https address nor http on loopback",
            hint="Give an https address with the same paths as https://github.com, or unset the variable.",
            field="BKPOOL_MIRROR",
        )
    machine = os.uname().machine
    asset, digests = release.fill(release.asset, machine), release.fill(release.digests_file, machine)
    if asset is None or digests is None:
        raise HostFault(f"bkpool knows no {release.name} release for {machine}")
    files = f"{base.rstrip('/')}/{release.repository}/releases/download/v{release.version}"
    report(f"asking for {release.name} {release.version} at {urllib.parse.urlsplit(base).hostname}", None)
    expected = DIGESTS.get(f"{release.name}/{asset}") or _published_digest(f"{files}/{digests}", asset)
    archive = work / "asset"
    with archive.open("wb") as out:
        digest = _download(f"{files}/{asset}", out, _MAX_ASSET, lambda done: report(f"downloading {asset}", done))
    if digest != expected:
        raise HostFault(f"the downloaded {asset} has the SHA-256 {digest} instead of {expected}; it is not used")
    return {tool: _unpack(archive, source.member, work / tool) for tool, source in release.tools.items()}


def digest_in(text: bytes, asset: str) -> str | None:
    """The SHA-256 of an asset in a digests file: lines of sha256sum, or subjects of an in-toto statement.

    None if the file does not name the asset, or names it with different digests.
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


def _published_digest(url: str, asset: str) -> str:
    text = io.BytesIO()
    _download(url, text, _MAX_DIGESTS, lambda _done: None)
    digest = digest_in(text.getvalue(), asset)
    if digest is None:
        raise HostFault(f"{url} has no digest for {asset}, so it is not downloaded")
    return digest


def _download(url: str, out: BinaryIO, max_bytes: int, report: Callable[[float | None], None]) -> str:
    """Writes the content of an address to a file and returns its SHA-256."""
    try:
        with _opener(url).open(url, timeout=_READ_TIMEOUT) as answer:
            return _copy(answer, url, out, max_bytes, report)
    except urllib.error.HTTPError as error:
        error.close()
        raise HostFault(f"{url} cannot be downloaded: HTTP {error.code} {error.reason}", hint=_HINT) from None
    except urllib.error.URLError as error:
        raise HostFault(f"{url} cannot be reached: {error.reason}", hint=_HINT, code=UNREACHABLE) from None
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise HostFault(f"the download of {url} was cut: {str(error) or type(error).__name__}", hint=_HINT) from None


_HINT = "Set BKPOOL_MIRROR to an address with the same paths as https://github.com."


def _copy(
    answer: http.client.HTTPResponse, url: str, out: BinaryIO, max_bytes: int, report: Callable[[float | None], None]
) -> str:
    length = answer.length  # from Content-Length, if there was one
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT
    digest, size, reported = hashlib.sha256(), 0, -1
    while chunk := answer.read1(_CHUNK):
        digest.update(chunk)
        out.write(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise HostFault(f"{url} is larger than {max_bytes >> 20} MiB; it is not used")
        if time.monotonic() > deadline:
            raise HostFault(f"the download of {url} took longer than {_DOWNLOAD_TIMEOUT:.0f} s", hint=_HINT)
        percent = 100 * size // length if length else 0
        if percent != reported:
            reported = percent
            report(size / length if length else None)
    if length is not None and size != length:
        raise HostFault(f"the download of {url} was cut after {size} of {length} bytes", hint=_HINT)
    return digest.hexdigest()


def _unpack(archive: Path, member: str, target: Path) -> Path:
    if not member:
        return archive.rename(target)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            info = tar.getmember(member)
            source: IO[bytes] | None = tar.extractfile(info) if info.isreg() else None
            if source is None or info.size > _MAX_ASSET:
                raise HostFault(f"{member} in the downloaded archive is not a file, or is too large")
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
    except (KeyError, EOFError, tarfile.TarError, zlib.error) as error:
        raise HostFault(f"the downloaded archive has no {member}: {error}") from None
    return target


def _opener(url: str) -> urllib.request.OpenerDirector:
    loopback = urllib.parse.urlsplit(url).hostname in LOOPBACK
    proxies = [urllib.request.ProxyHandler({})] if loopback else []
    opener = urllib.request.build_opener(_SafeRedirectHandler, *proxies)
    opener.addheaders = [("User-Agent", "bkpool")]
    return opener


class _SafeRedirectHandler(urllib.request.HTTPRedirectHandler):
    max_redirections = _MAX_REDIRECTS

    def redirect_request(  # noqa: PLR0917 - the standard library's signature
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        # A request over TLS must not be answered without TLS, not even from loopback.
        if not _is_allowed(newurl) or (req.type == "https" and not newurl.startswith("https:")):
            fp.close()
            raise HostFault(f"{req.full_url} redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_allowed(url: str) -> bool:
    try:
        return is_protected(urllib.parse.urlsplit(url))
    except ValueError:
        return False
