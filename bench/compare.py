"""Compares the gateway with other proxies: the same loads in interleaved runs, in a rotating order.

The result is plain data, as `--json` prints it. Table and plot are made from it. A proxy that cannot be measured
gives a note instead of a figure.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.certificates import issue
from bench.gateway import has_threads
from bench.loads import LOADS, Ground, Load, Sample, Sizes, ground
from bench.peers import LEGS, UNIX, Bkpool, Ghostunnel, Haproxy, Nginx, Peer
from bench.process import FaultError, cores

_LEASES = 8  # leases of the scaling figure: a lease has one loop, so a single one shows nothing
_SCALED = ("connections", "up64", "down64")


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    runs: int
    sizes: Sizes
    loop: str = "uvloop"
    legs: Sequence[str] = tuple(LEGS)
    loads: Sequence[str] = tuple(LOADS)


@dataclass
class Notes:
    """What a reader of the table must know: each note once, in the order of the first occurrence."""

    texts: dict[str, None] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """Adds a note, unless it exists."""
        if text not in self.texts:
            print(f"note: {text}", file=sys.stderr)
        self.texts[text] = None


def side_by_side(plan: Plan, notes: Notes) -> list[dict[str, Any]]:
    """Measures each load through each proxy on each leg. Returns rows with one figure for each run."""
    peers: list[Peer] = [Nginx(), Haproxy(), Ghostunnel(), Bkpool(plan.loop)]
    proxy_on, client_on = cores()
    rows = {(leg, name): _row(leg, LOADS[name], peers) for leg in plan.legs for name in plan.loads}
    with tempfile.TemporaryDirectory(prefix="bkbench-") as name, _ground(Path(name), plan, client_on) as base:
        for run in range(plan.runs):
            for number, (leg, load) in enumerate(rows):
                row = rows[leg, load]
                print(f"run {run + 1} of {plan.runs}: {LEGS[leg]}, {LOADS[load].title}", file=sys.stderr)
                for peer in _rotated(peers, run + number):
                    try:
                        sample = base.measure(peer, leg, LOADS[load], pinned=(proxy_on, client_on))
                    except FaultError as fault:
                        notes.add(f"{peer.name}, {LEGS[leg]}: {fault}")
                        row["figures"][peer.name].append(None)
                        continue
                    row["figures"][peer.name].append(LOADS[load].figure(sample))
                    row["busy"][peer.name].append(sample.cpu / sample.seconds)
                    row["ciphers"][peer.name] = sample.cipher
    _note_ciphers(rows.values(), notes)
    return list(rows.values())


def scaling(plan: Plan, notes: Notes) -> list[dict[str, Any]]:
    """Compares the time with two event loops (nginx: processes) and with one. Everything may use all cores."""
    peers: list[Peer] = [Nginx(), Bkpool(plan.loop)]
    if not has_threads():
        notes.add("bkpool, 2 loops: this gateway has one")
        peers.pop()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bkbench-") as name, _ground(Path(name), plan, None) as base:
        for load in (LOADS[name] for name in _SCALED):
            row = _row(UNIX, load, peers)
            row["unit"] = "rate with 2 ÷ with 1"
            for run in range(plan.runs):
                print(f"run {run + 1} of {plan.runs}: 2 loops ÷ 1, {load.title}", file=sys.stderr)
                for peer in _rotated(peers, run):
                    try:
                        one, two = _one_and_two(base, peer, load, two_first=bool(run % 2))
                    except FaultError as fault:
                        notes.add(f"{peer.name}, 2 loops: {fault}")
                        continue
                    row["figures"][peer.name].append(one.seconds / two.seconds)
                    row["busy"][peer.name].append(two.cpu / two.seconds)
            rows.append(row)
    return rows


def versions(plan: Plan) -> dict[str, str]:
    """What was compared."""
    found: dict[str, str] = {}
    for peer in (Nginx(), Haproxy(), Ghostunnel(), Bkpool(plan.loop)):
        try:
            found[peer.name] = peer.version()
        except FaultError as fault:
            found[peer.name] = str(fault)
    return found


def _one_and_two(base: Ground, peer: Peer, load: Load, *, two_first: bool) -> tuple[Sample, Sample]:
    first, second = (2, 1) if two_first else (1, 2)
    samples = {
        workers: base.measure(peer, UNIX, load, workers=workers, leases=_LEASES, pinned=None)
        for workers in (first, second)
    }
    return samples[1], samples[2]


def _row(leg: str, load: Load, peers: Sequence[Peer]) -> dict[str, Any]:
    names = [peer.name for peer in peers]
    return {
        "leg": leg,
        "load": load.name,
        "title": load.title,
        "unit": load.unit,
        "more_is_better": load.more_is_better,
        "figures": {name: [] for name in names},
        "busy": {name: [] for name in names},
        "ciphers": {},
    }


def _ground(directory: Path, plan: Plan, on: set[int] | None) -> AbstractContextManager[Ground]:
    pki = directory / "pki"
    pki.mkdir()
    return ground(directory, issue(pki, _LEASES), plan.sizes, on)


def _rotated(peers: list[Peer], by: int) -> list[Peer]:
    by %= len(peers)
    return peers[by:] + peers[:by]


def _note_ciphers(rows: Iterable[dict[str, Any]], notes: Notes) -> None:
    """Adds a note if a proxy chose another cipher, because then it did not do the same work."""
    chosen: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, cipher in row["ciphers"].items():
            chosen[cipher].add(name)
    if len(chosen) > 1:
        notes.add("; ".join(f"{', '.join(sorted(names))}: {cipher}" for cipher, names in sorted(chosen.items())))
