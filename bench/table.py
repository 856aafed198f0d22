"""Makes the tables from the data of the parts, as aligned text or as Markdown. It is pure.

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
"""One line of a table, with a cell for each column. A line with only one cell is a heading."""
SIZE_COLUMNS = (
    "pools × workers each",
    "workers",
    "allocate p50 / p99, ms",
    "CPU per lease, ms",
    "one look, ms",
    "looks per lease",
    "one gateway table, ms",
    "tables per lease",
    "leases/s",
)
STEP_COLUMNS = (
    "what happens",
    "steps",
    "over 10 ms",
    "longest step, ms (where)",
    "longest garbage collection, ms",
)


def spread(values: Sequence[float]) -> str:
    """Returns median and range; a dash without values."""
    if not values:
        return "–"
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(statistics.median(values))} ({_number(min(values))} – {_number(max(values))})"


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value that this share of the values is below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


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


def sizes(rows: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """Returns the table of leases by the size of the installation, with its head; nothing without rows."""
    return [SIZE_COLUMNS, *map(_size, rows)] if rows else []


def decisions(rows: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """Returns the table of decisions, with a column for each number of workers; nothing without rows."""
    counts = sorted({row["workers"] for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cells.setdefault(row["what"], {})[row["workers"]] = spread(row["ms"])
    head = ("one decision, ms", *(f"{count:,} workers" for count in counts))
    return [head, *((what, *(of[count] for count in counts)) for what, of in cells.items())] if rows else []


def steps(rows: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """Returns the table of the steps of loops, with its head; nothing without rows."""
    return [STEP_COLUMNS, *map(_step, rows)] if rows else []


def cluster(found: Mapping[str, Any]) -> list[TableRow]:
    """Returns the table of leases in a cluster, with its head; nothing if it was not measured."""
    return [(str(found["what"]), "bar", "measured"), *map(tuple, found["rows"])] if found else []


def text(document: Mapping[str, Any]) -> str:
    """For a terminal."""
    return "\n\n".join([*map(_aligned, _tables(document)), "\n".join(_below(document))])


def markdown(document: Mapping[str, Any]) -> str:
    """For docs/benchmarks.md."""
    return "\n\n".join([*map(_piped, _tables(document)), "\n".join(f"* {say}" for say in _below(document))])


def _tables(document: Mapping[str, Any]) -> list[list[TableRow]]:
    """Returns the tables that have lines, each with its head."""
    compared = lines(document)
    tables = [_used([COLUMNS, *compared]) if compared else []]
    tables += [sizes(document.get("sizes", [])), decisions(document.get("decisions", []))]
    tables += [steps(document.get("steps", []))]
    tables += [cluster(document.get("cluster", {}))]
    return [table for table in tables if table]


def _aligned(table: Sequence[TableRow]) -> str:
    widths = [max(len(line[column]) for line in table if any(line[1:])) for column in range(len(table[0]))]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in aligned)


def _piped(table: Sequence[TableRow]) -> str:
    head, *body = table
    made = [head, tuple("---" for _ in head)]
    made += [line if any(line[1:]) else (f"**{line[0]}**", *line[1:]) for line in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in made)


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


def _size(row: Mapping[str, Any]) -> TableRow:
    def number(name: str) -> str:
        return _number(row[name])

    return (
        f"{row['pools']:,} × {row['each']:,}",
        f"{row['pools'] * row['each']:,}",
        f"{number('p50')} / {number('p99')}",
        *map(number, ("cpu", "look", "looks", "table", "tables", "rate")),
    )


def _step(row: Mapping[str, Any]) -> TableRow:
    longest = f"{_number(row['longest'])} ({row['longest_what']})"
    return (row["what"], f"{row['steps']:,}", str(row["beyond"]), longest, _number(row["collecting"]))


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
