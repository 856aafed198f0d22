"""The runtime of a cluster: each worker is a pod, reached over mutual TLS.

It puts the parts of this room together, begins to watch, and closes. It never starts a pod by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from bkpool.core.allowances import Allowances
from bkpool.core.pool import CacheGC
from bkpool.kube import KubeApi
from bkpool.pki.pool_authority import PoolAuthorities, WorkerContexts
from bkpool.workers.config import GC_DEFAULTS
from bkpool.workers.ignored_fields import IGNORED_IN_CLUSTER
from bkpool.workers.pods.host_ports import HostPorts
from bkpool.workers.pods.pod_caches import PodCaches
from bkpool.workers.pods.pod_daemons import PodDaemons
from bkpool.workers.pods.pod_diagnosis import PodDiagnosis
from bkpool.workers.pods.pod_probe import PodProbe
from bkpool.workers.pods.pod_slots import PodSlots
from bkpool.workers.pods.pod_writes import PodWrites
from bkpool.workers.pods.start_deadline import Deadlines

__all__ = ["Deadlines", "PodRuntime"]


class PodRuntime:
    """Runs workers as pods; implements `Runtime`.

    Args:
        api: The cluster. The caller closes it.
        authorities: Issue the workers' certificates, and those of this process for its connections to workers.
        name: The name of this process in its certificates, in ASCII.
        image: The image of a pool that names none; None: BuildKit's own, rootless unless the pool is `privileged`.
        host_ports: The ports of `host` that lead to the cluster's node, if pods' own addresses cannot be reached from
            here (kind).
        host: The address of these ports.
        namespaces: Where pools may be; None: everywhere.
        ignored_spec_fields: Fields of a pool's spec that nothing reads here (`workers.ignored_fields`).
        now: The clock, for certificates.
        deadlines: How long each stage of a start may take.
        gc_defaults: For pools whose spec says nothing about collection (`workers.config`).
        allowed: What pools may ask for; None: everything.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        authorities: PoolAuthorities,
        name: str = "bkpool",
        image: str | None = None,
        host_ports: Sequence[int] | None = None,
        host: str = "127.0.0.1",
        namespaces: Sequence[str] | None = None,
        ignored_spec_fields: Collection[str] = IGNORED_IN_CLUSTER,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        deadlines: Deadlines | None = None,
        gc_defaults: CacheGC = GC_DEFAULTS,
        allowed: Allowances | None = None,
    ) -> None:
        deadlines = deadlines or Deadlines()
        self.contexts = WorkerContexts(authorities, name, now)
        """The TLS settings by which this process connects to workers."""
        probe = PodProbe(self.contexts, None if host_ports is None else host)
        diagnosis = PodDiagnosis(api)
        self._slots = PodSlots(api, probe, diagnosis, namespaces)
        writes = PodWrites(
            api,
            authorities,
            pods=self._slots.pods,
            claims=self._slots.claims,
            now=now,
            deletion_timeout=deadlines.ending,
            gc_defaults=gc_defaults,
        )
        self.daemons = PodDaemons(
            self._slots,
            writes,
            probe,
            diagnosis,
            host_ports=None if host_ports is None else HostPorts(host_ports),
            image=image,
            ignored_spec_fields=ignored_spec_fields,
            deadlines=deadlines,
            allowed=allowed,
            authorities=authorities,
        )
        self.caches = PodCaches(self._slots, writes)

    async def adopt(self) -> None:
        """Begins to watch the cluster, and probes every pod that is there.

        Raises:
            Forbidden: The rights to list or watch are missing.
        """
        await self._slots.open()

    async def close(self, *, stop_workers: bool) -> None:  # noqa: ARG002 - pods outlive this process
        """Ends all background work. Pods run on."""
        await self._slots.close()
