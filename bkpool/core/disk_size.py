"""Sizes of caches as a pool's spec has them: 10GB, 1.5 TiB, 20%. Pure.

buildkitd holds a size in 64 bits, without a check: of a larger one it makes a negative number, and then keeps nothing
at all. A share of the disk must be a whole number for it, else it does not start.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_LARGEST = "512PB"  # no disk is as large
_LARGEST_BYTES = 512 * 1024**5  # buildkitd could hold 16 times as much, but its client cannot print it
_DIGITS = 40  # of a number, before and after its point
_WHOLE = 100  # per cent
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s?((?P<unit>[kKMGTP])?(i?B?)|(?P<share>%))")


class DiskSize(NamedTuple):
    """What a text means as a size."""

    amount: Fraction
    """Bytes or per cent."""
    is_share: bool

    @property
    def fits(self) -> bool:
        """Whether buildkitd can use it."""
        if self.is_share:
            return self.amount <= _WHOLE and self.amount.denominator == 1
        return self.amount <= _LARGEST_BYTES


def disk_size(text: str) -> DiskSize:
    """Reads a size. The units are powers of 1024, with or without an i. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is not a size with a unit")
    power = "kMGTP".index(found["unit"].replace("K", "k")) + 1 if found["unit"] else 0
    return DiskSize(number(found["number"]) * 1024**power, found["share"] is not None)


def number(digits: str) -> Fraction:
    """The number that a text of digits with or without a point means. All absurdly large ones are the same."""
    whole, _, part = digits.partition(".")
    return Fraction(f"{whole.lstrip('0')[:_DIGITS] or 0}.{part[:_DIGITS] or 0}")


def for_buildkitd(text: str) -> str:
    """A size of a stored spec as buildkitd can use it: the nearest one."""
    size = disk_size(text)
    if size.fits:
        return re.sub(r"\s", "", text)  # it takes "10 GB" but not "10 %"
    return f"{min(_WHOLE, round(size.amount))}%" if size.is_share else _LARGEST


def problem(text: str) -> str:
    """Why a size of a file is refused, as the end of a sentence; empty if it is not."""
    size = disk_size(text)
    if size.fits:
        return ""
    return "must be a whole number of per cent, at most 100%" if size.is_share else f"must be at most {_LARGEST}"
