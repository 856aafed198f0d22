"""Finds what has grown between two counts. It is pure, so the definition of a leak is tested without a soak.

A count is a flat mapping of names to numbers. Every number must be as before or less, except within its tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One quantity before and after."""

    name: str
    before: float
    after: float
    tolerance: float

    @property
    def grown(self) -> float:
        """How much it has grown; 0 if it has shrunk."""
        return max(0.0, self.after - self.before)

    @property
    def well(self) -> bool:
        """Whether it has not grown beyond its tolerance."""
        return self.grown <= self.tolerance


def flat(count: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns nested mappings as one, with the names joined by spaces."""
    found: dict[str, float] = {}
    for name, value in count.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = value
    return found


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], tolerances: Mapping[str, float], *, objects: float = 0.0
) -> list[Row]:
    """Returns a row for each quantity of either count. A missing one counts as 0.

    Args:
        before: The first count.
        after: The second count.
        tolerances: By how much a quantity may grow. Others must not grow.
        objects: By how much each kind of objects may grow, if `tolerances` does not say.
    """
    first, last = flat(before), flat(after)
    return [
        Row(name, first.get(name, 0), last.get(name, 0), tolerances.get(name, objects if _is_kind(name) else 0.0))
        for name in sorted(first | last)
    ]


def table(rows: list[Row], *, everything: bool = False) -> str:
    """Returns the rows as text. Kinds of objects that have not grown are left out, unless `everything` is true."""
    shown = [row for row in rows if everything or not row.well or not _is_kind(row.name)]
    width = max((len(row.name) for row in shown), default=0)
    lines = [f"{'':<{width}}  {'before':>10}  {'after':>10}  {'may grow':>8}"]
    for row in shown:
        mark = "" if row.well else f"  GREW by {row.grown:g}"
        lines.append(f"{row.name:<{width}}  {row.before:>10g}  {row.after:>10g}  {row.tolerance:>8g}{mark}")
    hidden = len(rows) - len(shown)
    more = f"and {hidden} kinds of objects, none of which has grown more than it may"
    return "\n".join([*lines, more] if hidden else lines)


def _is_kind(name: str) -> bool:
    return name.startswith("objects ")
