"""What bench/cluster.py has measured, and the rows of its table, with the bars. It is pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.table import percentile

CONTROL, GATEWAYS, DRIVER = "control", "gateways", "driver"
"""The clients of the API server, by their names there."""
AT_RATE = 200
"""Leases a second to which the figures are extrapolated."""
_WRITES, _READS = {"create", "update", "patch", "delete"}, {"get", "list"}
_RARE = 0.005
"""Requests of one kind for each lease that need no line of their own."""


@dataclass(frozen=True, slots=True)
class ClusterSize:
    """What is measured."""

    pools: int = 50
    workers: int = 2000
    """In all pools together."""
    replicas: int = 2
    """Of API and controller, as the manifests have them."""
    seconds: float = 300.0

    @property
    def each(self) -> int:
        """Workers of a pool."""
        return self.workers // self.pools


SIZE = ClusterSize()
"""What is measured if nothing else is asked for."""


@dataclass(slots=True)
class ClusterFigures:
    """What a run has given."""

    size: ClusterSize
    took: list[float] = field(default_factory=list)
    """Seconds of each allocate, from the call to the answer."""
    lasted: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """Seconds of processor time, by what used it."""
    memory: list[float] = field(default_factory=list)
    """MiB of each control replica."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def leases(self) -> int:
        """How many leases there were from the beginning to the end."""
        return len(self.took)


def rows(found: ClusterFigures) -> list[tuple[str, str, str]]:
    """What was measured: what, the bar, the figure."""
    leases, rate = max(found.leases, 1), found.leases / found.lasted
    control, writes = found.cpu[CONTROL] / leases * 1000, _per_lease(found, _WRITES)
    watched = sum(count for *_, count in found.counts["watch_bytes"]) / leases / 1000
    reads = [f"{_per_lease(found, {verb}):.2f}" for verb in ("get", "list")]
    ms = [f"{percentile(found.took, share) * 1000:.0f}" for share in (0.5, 0.99)] if found.took else ["–", "–"]
    others = ", ".join(f"{name} {spent / leases * 1000:.1f}" for name, spent in found.cpu.items() if name != CONTROL)
    made = [
        ("leases/s, as many as the machine carries", "", f"{rate:.1f}"),
        ("allocate p50 / p99, ms", "", " / ".join(ms)),
        (f"CPU of {found.size.replicas} control replicas per lease, ms", "12", f"{control:.1f}"),
        ("writes per lease", "12", f"{writes:.2f}"),
        ("bytes of watches per lease, KB", "250", f"{watched:.1f}"),
        ("memory of a control replica, MiB", "300", " / ".join(f"{one:.0f}" for one in found.memory)),
        ("GETs / LISTs per lease", "", " / ".join(reads)),
        ("objects sent to watches per lease", "", f"{_events(found) / leases:.1f}"),
        ("CPU of others per lease, ms", "", others),
        ("probes of workers per lease", "", f"{found.counts['probes'] / leases:.2f}"),
        *((f"at {AT_RATE} leases/s, extrapolated: {what}", "", value) for what, value in _at_rate(found)),
        *((f"per lease: {by}, {what}", "", f"{times / leases:.2f}") for (by, what), times in _requests(found)),
    ]
    return made + [(f"failed: {why}", "", str(times)) for why, times in found.failed.items()]


def _at_rate(found: ClusterFigures) -> list[tuple[str, str]]:
    leases = max(found.leases, 1)
    watched = sum(count for *_, count in found.counts["watch_bytes"]) / leases
    return [
        ("cores of control", f"{found.cpu[CONTROL] / leases * AT_RATE:.1f}"),
        ("writes/s", f"{_per_lease(found, _WRITES) * AT_RATE:,.0f}"),
        ("MB/s of watches", f"{watched * AT_RATE / 1e6:.1f}"),
    ]


def _per_lease(found: ClusterFigures, verbs: set[str]) -> float:
    requests = found.counts["requests"]
    return sum(int(times) for user, verb, _, times in requests if verb in verbs and user != DRIVER) / max(
        found.leases, 1
    )


def _events(found: ClusterFigures) -> int:
    return sum(count for *_, count in found.counts["watch_events"])


def _requests(found: ClusterFigures) -> list[tuple[tuple[str, str], int]]:
    """The requests by who made them and of what, the most frequent ones first. Those that are rare are left out."""
    requests: Counter[tuple[str, str]] = Counter()
    for user, verb, resource, times in found.counts["requests"]:
        if verb in _WRITES | _READS and user != DRIVER:
            requests[user, f"{verb} {resource}"] += times
    return [(what, times) for what, times in requests.most_common() if times >= _RARE * found.leases]
