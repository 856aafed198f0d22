"""Which port of the host leads to which worker, where pods have no address that the host can reach (kind).

All pools share the ports. Nothing here asks whether a port is free on the machine: the cluster holds them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from bkpool.core.errors import WorkerFailed

_FIELD = "kind-config.yaml"


class HostPorts:
    """Hands out ports; whoever holds one already is told by the caller.

    Args:
        ports: All there are.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = tuple(ports)
        self._reserved: set[int] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._ports)

    @contextmanager
    def reserved(self, used: Collection[int]) -> Iterator[int]:
        """A port that nobody else is given meanwhile.

        Args:
            used: Those of the pods that there are, and those that are of no use.

        Raises:
            WorkerFailed: There is none.
        """
        free = self._free(used)
        if not free:
            raise WorkerFailed(
                f"all {len(self._ports)} host ports for workers ({self._described()}) are in use",
                hint=f"Lower the pools' spec.scaling.max, or map more ports in {_FIELD} and make the cluster anew.",
            )
        # In turn, not the lowest: what still comes for a port's former worker should not find another one there.
        port = next((port for port in free if port >= self._next), free[0])
        self._next = port + 1
        self._reserved.add(port)
        try:
            yield port
        finally:
            self._reserved.discard(port)

    def any_free(self, used: Collection[int]) -> bool:
        """Whether there is one."""
        return bool(self._free(used))

    def _free(self, used: Collection[int]) -> list[int]:
        return sorted(set(self._ports) - set(used) - self._reserved)

    def _described(self) -> str:
        return f"{min(self._ports)} to {max(self._ports)}" if self._ports else "none are mapped"
