"""What a runtime reports: the state of each slot, and how many workers it can run.

These are plain values. A runtime fills them in, and `core.reconcile` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType

from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.registrations import NONE_SEEN, Expiries
from bkpool.core.worker import Worker


class DaemonState(StrEnum):
    """The state of the buildkitd in a slot."""

    STARTING = "starting"
    """It exists, but it does not answer: not yet, or no longer."""
    READY = "ready"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Silence:
    """A buildkitd that has answered before, and does not answer now."""

    lasted: timedelta
    """From the begin of the first probe without an answer to the end of the last one. A computer's sleep is no part
    of it."""
    lost: str = ""
    """What of it was removed, so that nobody can use it any more; empty: it may only be slow."""
    builds_fail: bool = False
    """Not even a build that runs can succeed: its cache was removed."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A slot as the runtime sees it now. An empty slot has no observation."""

    worker_uid: str
    """The worker object for which buildkitd was started."""
    state: DaemonState
    endpoint: str
    cache_owner: str | None
    """Digest of the cache's owner; None while the cache is clean."""
    message: str = ""
    """After an exit: how buildkitd ended. It never contains text from buildkitd's log."""
    log_tail: str = ""
    """After an exit: the last lines of buildkitd's log, which may contain output of a caller's build."""
    ephemeral_cache: bool = False
    """The cache is deleted together with the worker."""
    protected: bool | None = None
    """Whether the cluster is asked not to evict the worker; None where nothing can evict it."""
    goes_unprotected: bool = False
    """It is replaced as soon as it is not protected."""
    silence: Silence | None = None
    """It does not answer at the moment; None: it answered the last probe."""
    spec_digest: str = ""
    """The digest of those parts of the pool's spec that it was started with; empty if that is not known."""
    outdated: bool = False
    """It was started with another configuration, image, limits or network than the pool's spec of today gives."""
    reaches_other: bool = False
    """Its builds reach, or may do, something else than the pool's spec of today opens. Then it is outdated, too."""
    pod_name: str | None = None
    pod_ip: str | None = None


@dataclass(frozen=True, slots=True)
class SeenCache:
    """A cache that outlives its daemon."""

    owner: str | None
    """The digest of its owner; None: it is clean."""


MOST_STARTS = 16
"""While so many workers of all pools start in a cluster, none without a lease begins to. Each has objects to write,
and is asked up to 40 times a second (0.05 ms of a processor while nothing listens, 2.5 ms for the handshake): so many
take a tenth of a processor. 400 at once kept a controller from renewing its leader Lease."""
MOST_RESTARTS = 4
"""Outdated daemons of all pools that are replaced at once. While others start or stop, there are fewer."""


def ready_observation(worker: Worker, seen: Observation | None) -> Observation | None:
    """The observation, if it is of this worker's own buildkitd and that is ready; else None."""
    return seen if seen and seen.state is DaemonState.READY and seen.worker_uid == worker.uid else None


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """How many workers of all pools a runtime can run at once, and what the limit is."""

    workers: int
    limit: str
    """The second half of a sentence that names the limit: "this cluster has host ports for 4 workers"."""
    reason: str
    """The same in one CamelCase word, for a condition."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One pool at one moment, with everything that matters for decisions about it."""

    pool: Pool
    workers: tuple[Worker, ...]
    observed: Mapping[Slot, Observation]
    caches: Mapping[Slot, str | None]
    """The caches of the pool's slots, each with the digest of its owner (None: clean)."""
    busy: frozenset[Slot] = frozenset()
    """Slots in which an action is still running. Nothing is decided about them."""
    registered_until: Expiries = field(default_factory=lambda: NONE_SEEN)
    """When the registrations of gateways expire, on the clock of the one who decides. A missing one is valid."""
    starts_left: int = MOST_STARTS
    """How many workers without a lease may begin to start now, beside the starts of all pools that are under way."""
    restarts_left: int = MOST_RESTARTS
    """How many outdated daemons may be replaced now, beside the starts and stops of all pools that are under way."""
    unreadable_slots: frozenset[Slot] = frozenset()
    """Slots whose worker cannot be read. Nothing is created, started, stopped or wiped there."""
    undelivered_for: Mapping[str, timedelta] = field(default_factory=lambda: MappingProxyType({}))
    """For each lease that no caller is known to have: for how long the controller has seen it unchanged
    (`reconcile.undelivered`)."""
    lease_since: Mapping[Key, datetime] = field(default_factory=lambda: MappingProxyType({}))
    """Since when each worker has the lease that it has, or none. What is missing has been so for long."""
