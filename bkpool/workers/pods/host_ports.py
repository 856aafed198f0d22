"""Assigns ports of the host to workers, where the host cannot reach the addresses of pods (kind).

All pools share the ports. Nothing here checks whether a port is free on the machine: the cluster has bound them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from bkpool.core.errors import WorkerFailed

_FIELD = "kind-config.yaml"


class HostPorts:
    """Assigns ports. The caller says which ones pods use already.

    Args:
        ports: All ports.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = tuple(ports)
        self._reserved: set[int] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._ports)

    @contextmanager
    def reserved(self, used: Collection[int]) -> Iterator[int]:
        """Reserves a port while a pod with it is made.

        Args:
            used: Ports of existing pods, and ports that were found to be taken.

        Raises:
            WorkerFailed: No port is free.
        """
        free = self._free(used)
        if not free:
            raise WorkerFailed(
                f"all {len(self._ports)} host ports for workers ({self._described()}) are in use",
                hint=f"Lower the pools' spec.scaling.max, or map more ports in {_FIELD} and recreate the cluster.",
            )
        # In turn, not the lowest one: late connections for a port's former worker should not reach the next one.
        port = next((port for port in free if port >= self._next), free[0])
        self._next = port + 1
        self._reserved.add(port)
        try:
            yield port
        finally:
            self._reserved.discard(port)

    def any_free(self, used: Collection[int]) -> bool:
        """Whether a port is free."""
        return bool(self._free(used))

    def _free(self, used: Collection[int]) -> list[int]:
        return sorted(set(self._ports) - set(used) - self._reserved)

    def _described(self) -> str:
        return f"{min(self._ports)} to {max(self._ports)}" if self._ports else "none are mapped"
