"""Makes the table from the data of the parts, as aligned text or as Markdown. It is pure.

The figure of a proxy is its ratio to nginx in the same run. For nginx and bkpool the table also has the figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers import LEGS

_NGINX, _BKPOOL = "nginx", "bkpool"
_NOT_TO_THE_FULL = {"pingpong", "idle", "messages"}
"""Loads that wait for answers."""
COLUMNS = ("what", "nginx", "HAProxy ÷ nginx", "ghostunnel ÷ nginx", "bkpool ÷ nginx", "bkpool")
TableRow = tuple[str, ...]
"""One line of the table, with a cell for each of COLUMNS. A line with only one cell is a heading."""


def spread(values: Sequence[float]) -> str:
    """Returns median and range; a dash without values."""
    if not values:
        return "–"
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(statistics.median(values))} ({_number(min(values))} – {_number(max(values))})"


def known(figures: Sequence[float | None]) -> list[float]:
    """Returns the figures of the runs that have one."""
    return [figure for figure in figures if figure is not None]


def ratios(row: Mapping[str, Any], peer: str) -> list[float]:
    """Returns the figures of a proxy as ratios to nginx, for each run."""
    figures = row["figures"]
    pairs = zip(figures.get(peer, []), figures.get(_NGINX, []), strict=False)
    return [ours / theirs for ours, theirs in pairs if ours is not None and theirs]


def lines(document: Mapping[str, Any]) -> list[TableRow]:
    """Returns the table without its head."""
    made: list[TableRow] = []
    rows = document.get("gateway", [])
    for leg, title in LEGS.items():
        of_leg = [_compared(row) for row in rows if row["leg"] == leg]
        made += [_heading(title), *of_leg] if of_leg else []
    if scaled := document.get("scaling", []):
        made += [_heading("two event loops (nginx: processes), all cores for everything"), *map(_scaled, scaled)]
    if others := document.get("figures", {}):
        made += [_heading("the appliance"), *((name, "", "", "", "", str(value)) for name, value in others.items())]
    return made


def text(document: Mapping[str, Any]) -> str:
    """For a terminal."""
    table = _used([COLUMNS, *lines(document)])
    widths = [max(len(line[column]) for line in table if any(line[1:])) for column in range(len(table[0]))]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join([*(line.rstrip() for line in aligned), "", *_below(document)])


def markdown(document: Mapping[str, Any]) -> str:
    """For docs/benchmarks.md."""
    head, *body = _used([COLUMNS, *lines(document)])
    table = [head, tuple("---" for _ in head)]
    table += [line if any(line[1:]) else (f"**{line[0]}**", *line[1:]) for line in body]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in table), "", *(f"* {say}" for say in _below(document))])


def _number(value: float) -> str:
    """Returns a number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _used(table: Sequence[TableRow]) -> list[TableRow]:
    """Returns the table without empty columns."""
    used = [column for column in range(len(COLUMNS)) if any(line[column] for line in table[1:])]
    return [tuple(line[column] for column in used) for line in table]


def _compared(row: Mapping[str, Any]) -> TableRow:
    direction = "" if row["more_is_better"] else " (less is better)"
    ours = row["figures"].get(_BKPOOL, [])
    return (
        f"{row['title']}; {row['unit']}{direction}",
        spread(known(row["figures"].get(_NGINX, []))),
        *(spread(ratios(row, peer)) for peer in ("HAProxy", "ghostunnel", _BKPOOL)),
        spread(known(ours)),
    )


def _scaled(row: Mapping[str, Any]) -> TableRow:
    def cell(peer: str) -> str:
        factors, busy = known(row["figures"].get(peer, [])), row["busy"].get(peer, [])
        return f"{spread(factors)}; {statistics.median(busy):.2f} cores" if factors else "–"

    return (f"{row['title']}; {row['unit']}", cell(_NGINX), "", "", "", cell(_BKPOOL))


def _heading(title: str) -> TableRow:
    return (title, *("" for _ in COLUMNS[1:]))


def _below(document: Mapping[str, Any]) -> list[str]:
    machine = document["machine"]
    compared = "; ".join(f"{name}: {version}" for name, version in document.get("versions", {}).items())
    notes = [
        f"{machine['what']}; load average before: {machine['load']:.1f}",
        f"runs: {document['runs']}; medians (min – max)",
    ]
    busy = _busy(document.get("gateway", []))
    return [*notes, *(line for line in (compared, busy) if line), *document.get("notes", [])]


def _busy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns how much of its core each proxy used. Far below 1, the proxy waited for the load."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["load"] not in _NOT_TO_THE_FULL:
            for peer, busy in row["busy"].items():
                shares.setdefault(peer, []).extend(busy)
    shown = ", ".join(f"{peer} {spread(busy)}" for peer, busy in shares.items() if busy)
    return f"processor seconds per second under full load: {shown}" if shown else ""
