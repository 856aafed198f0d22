"""Amounts as Kubernetes writes them: 500m, 2, 4Gi. Pure; whether a text is an amount is checked where it is read."""

from __future__ import annotations

import re
from fractions import Fraction

_PARTS = re.compile(r"(?P<number>[0-9.]+)(?P<unit>[eE][0-9]+|[a-zA-Z]*)")
_DECIMAL = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def amount(text: int | str) -> Fraction:
    """The exact value of an amount.

    Raises:
        ValueError: It is not an amount.
    """
    parts = _PARTS.fullmatch(str(text))
    if parts is None:
        raise ValueError(f"{text!r} is not an amount such as 500m, 2 or 4Gi")
    number, unit = Fraction(parts["number"]), parts["unit"]
    if unit in _BINARY:
        return number * Fraction(1024 ** _BINARY[unit])
    power = 3 * _DECIMAL[unit] if unit in _DECIMAL else int(unit[1:])
    return number * Fraction(10**power) if power >= 0 else number / Fraction(10**-power)
