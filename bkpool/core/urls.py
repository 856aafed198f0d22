"""Which URLs may carry a secret, or something that must not be changed on the way. Pure."""

from __future__ import annotations

from urllib.parse import SplitResult

from bkpool.core.names import LOOPBACK


def is_protected(url: SplitResult) -> bool:
    """Whether nobody on the way can read or change what is exchanged: https, or http that stays on this machine."""
    return bool(url.hostname) and (url.scheme == "https" or (url.scheme == "http" and url.hostname in LOOPBACK))
