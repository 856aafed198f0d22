"""One digest, for processes and pods, of what of a pool's spec reaches a daemon.

A daemon keeps the digest that it was started with. Where the spec of today has another one, the daemon is outdated.
The size of a pool and who may use it reach no daemon, so they are in no digest.
"""

from __future__ import annotations

import hashlib


def spec_digest(*parts: object) -> str:
    """The digest of these parts.

    Args:
        *parts: Plain values whose `repr` depends on nothing but their content.
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
