"""How much of a machine its workers may take, and the files of cgroups that say so. Pure.

The kernel enforces these limits. A build that needs more memory is ended by the kernel, not by bkpool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bkpool.core.pool import ResourceRequirements
from bkpool.core.quantity import amount

_GIB = 1 << 30
_RESERVED_SHARE = 10  # per cent of the memory that workers never get, so that the machine can still be used
_PERIOD = 100_000  # microseconds: the kernel's default period of a CPU quota
_SHARES, _MOST_SHARES = 1024, 262_144  # version 1: of one CPU, and the largest value
_MOST_WEIGHT = 10_000  # version 2

PIDS = 8192
"""Processes and threads of a slot: much more than a parallel build has, much less than a machine (32,768 or more)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a slot may use. None: no limit of its own."""

    memory: int | None = None
    """Bytes, without swap."""
    reserved_memory: int | None = None
    """Bytes that the kernel takes from it last."""
    cpus: float | None = None
    """A quota."""
    cpu_weight: float | None = None
    """Its part of the CPUs while there is not enough for all, as a number of CPUs."""
    pids: int | None = PIDS

    @classmethod
    def of(cls, resources: ResourceRequirements) -> Limits:
        """The limits of a slot of a pool.

        Args:
            resources: `spec.resources.buildkit`. Other names than cpu, memory and pids have no effect.
        """
        limits = {name: amount(value) for name, value in resources.limits.items()}
        requests = {name: amount(value) for name, value in resources.requests.items()}
        return cls(
            memory=int(limits["memory"]) if "memory" in limits else None,
            reserved_memory=int(requests["memory"]) if "memory" in requests else None,
            cpus=float(limits["cpu"]) if "cpu" in limits else None,
            cpu_weight=float(requests["cpu"]) if "cpu" in requests else None,
            pids=int(limits.get("pids", PIDS)),
        )


def together(machine: int, own: int | None) -> Limits:
    """The limits of all slots of an appliance together.

    Args:
        machine: Bytes of memory of the machine.
        own: The limit of the appliance's own cgroup, in bytes; None: it has none.

    Returns:
        That memory, less 1 GiB or 10 %, whichever is more; on a very small machine at least half of it.
    """
    most = machine if own is None else min(machine, own)
    reserve = max(_GIB, most * _RESERVED_SHARE // 100)
    return Limits(memory=max(most - reserve, most // 2), pids=None)


def files(limits: Limits, *, unified: bool) -> Iterator[tuple[str, str, str]]:
    """The controller, the file and the content of each limit, in the order in which they can be written.

    Args:
        limits: What to write.
        unified: Whether this is for cgroup version 2.
    """
    return _version_2(limits) if unified else _version_1(limits)


def _version_1(limits: Limits) -> Iterator[tuple[str, str, str]]:
    if limits.memory is not None:
        yield "memory", "memory.limit_in_bytes", str(limits.memory)
        # With swap. It must not be less than the other.
        yield "memory", "memory.memsw.limit_in_bytes", str(limits.memory)
    if limits.reserved_memory is not None:
        yield "memory", "memory.soft_limit_in_bytes", str(limits.reserved_memory)
    if limits.cpus is not None:
        yield "cpu", "cpu.cfs_quota_us", str(_quota(limits.cpus))
    if limits.cpu_weight is not None:
        yield "cpu", "cpu.shares", str(_shares(limits.cpu_weight))
    if limits.pids is not None:
        yield "pids", "pids.max", str(limits.pids)


def _version_2(limits: Limits) -> Iterator[tuple[str, str, str]]:
    if limits.memory is not None:
        yield "memory", "memory.max", str(limits.memory)
        yield "memory", "memory.swap.max", "0"
    if limits.reserved_memory is not None:
        yield "memory", "memory.low", str(limits.reserved_memory)
    if limits.cpus is not None:
        yield "cpu", "cpu.max", f"{_quota(limits.cpus)} {_PERIOD}"
    if limits.cpu_weight is not None:
        # The conversion that Kubernetes and runc use, so that a request means the same on both versions.
        weight = 1 + (_shares(limits.cpu_weight) - 2) * (_MOST_WEIGHT - 1) // (_MOST_SHARES - 2)
        yield "cpu", "cpu.weight", str(weight)
    if limits.pids is not None:
        yield "pids", "pids.max", str(limits.pids)


def _quota(cpus: float) -> int:
    return max(1000, round(cpus * _PERIOD))  # the kernel refuses less than a millisecond


def _shares(cpus: float) -> int:
    return min(max(2, round(cpus * _SHARES)), _MOST_SHARES)
