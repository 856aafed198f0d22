"""Finds secrets, which must be in no log, error or metric.

It looks for their form, so it need not know the secrets.
"""

from __future__ import annotations

import re

_SHAPES = {
    "a JWT": r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a private key in base64": r"LS0tLS1CRUdJTiB(?:QUklWQVRFIEtFWS0t|FQyBQUklWQVRFIEtFWS0t)",
    # 32 bytes in base64url: tokens of leases and admins. Digests are hexadecimal, names have no capitals.
    "a token": r"(?<![\w/+-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{43}(?![\w/+=-])",
}


def secrets_in(text: str) -> list[str]:
    """Returns what was found: the kind and the text before it, but never the secret itself."""
    return [
        f"{name} after {text[max(0, found.start() - 60) : found.start()]!r}"
        for name, shape in _SHAPES.items()
        for found in re.finditer(shape, text)
    ]
