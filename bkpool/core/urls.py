"""Which URLs may carry a secret, or something that must not be changed on the way, and which are the same. Pure."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from bkpool.core.names import LOOPBACK


def is_protected(url: SplitResult) -> bool:
    """Whether nobody on the way can read or change what is exchanged: https, or http that stays on this machine."""
    return bool(url.hostname) and (url.scheme == "https" or (url.scheme == "http" and url.hostname in LOOPBACK))


_DEFAULT_PORTS = {"http": 80, "https": 443}


def canonical(url: str) -> str:
    """The one way to write the URL of a server: lower case, without the scheme's own port and a slash at the end.

    Raises:
        ValueError: It is not a URL with http:// or https://, or has a user, a query or a fragment.
    """
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port
    bare = parts.username is None and not parts.query and not parts.fragment
    if parts.scheme not in _DEFAULT_PORTS or not host or not bare or not url.isprintable() or " " in url:
        raise ValueError("is not a URL of the form https://host:port")
    shown_host = f"[{host}]" if ":" in host else host
    shown_port = "" if port in {None, _DEFAULT_PORTS[parts.scheme]} else f":{port}"
    return f"{parts.scheme}://{shown_host}{shown_port}{parts.path.rstrip('/')}"
