"""A buildkitd that runs and does not answer: what is written about it, and when it counts as hung and is replaced.

Two sides report: the runtime that its probes are not answered (`Observation.silence`), gateways that they hear
nothing from it, or that they do (`WorkerStatus.silent_since`). A stall of a few seconds ends nothing. The caller
supplies the time; nothing here makes a probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from bkpool.core.observation import Observation, Silence
from bkpool.core.reconcile.actions import Action, CheckDaemon, ReplaceDaemon, WriteStatus
from bkpool.core.registrations import NONE_SEEN, Expiries, live_registrations
from bkpool.core.worker import Worker


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """When a daemon that does not answer is replaced (rule 9, docs/rules.md#r9)."""

    unanswered: timedelta = timedelta(seconds=8)
    """How long no probe was answered, if nobody is connected. A shorter silence is a stall."""
    quiet: timedelta = timedelta(seconds=15)
    """How long neither an answer nor a byte came, if a gateway may have connections. BuildKit's own
    health check of a session gives up after the same time (docs/clients.md#cuts)."""
    unanswered_meanwhile: timedelta = timedelta(seconds=5)
    """How long of that no probe was answered: that no byte came is no sign by itself."""
    quiet_if_lost: timedelta = timedelta(seconds=10)
    """The same as `quiet` for one that lost its socket, so that only connections of before can still be used: a build
    on one of them brings a byte every 5 s (docs/clients.md#cuts). Less than the 15 s for which a gateway holds a
    client, so that the next build finds the worker back."""
    certain: timedelta = timedelta(seconds=0.5)
    """The same as `unanswered` for one that can never answer again. Its exit may be noticed in this time, and says
    more."""


DEFAULT_HEALTH = HealthLimits()


def health_step(
    worker: Worker,
    seen: Observation,
    now: datetime,
    *,
    registered_until: Expiries = NONE_SEEN,
    limits: HealthLimits = DEFAULT_HEALTH,
) -> Action | datetime | None:
    """The next step for a daemon that was ready and may be silent now.

    Args:
        worker: The worker.
        seen: What the runtime sees of its daemon.
        now: The time.
        registered_until: When the registrations of gateways expire.
        limits: When it is replaced.

    Returns:
        An action; the time at which there may be one; None: there is nothing to do.
    """
    silence, since = seen.silence, worker.status.silent_since
    if silence is None:
        return None if since is None else CheckDaemon(worker)
    quiet = limits.quiet_if_lost if silence.lost else limits.quiet
    if silence.builds_fail or not _may_have_connections(worker, registered_until, now):
        enough = limits.certain if silence.lost else limits.unanswered
        if silence.lasted >= enough:
            return ReplaceDaemon(worker, _reason(silence, silence.lasted))
    elif since is not None and silence.lasted >= limits.unanswered_meanwhile and now - since >= quiet:
        return ReplaceDaemon(worker, _reason(silence, now - since))
    if since is None or since > now:  # later than now: a gateway's clock is ahead of ours
        return WriteStatus(worker.noted_answering().noted_silent(now))
    return since + quiet if now < since + quiet else None


def _may_have_connections(worker: Worker, registered_until: Expiries, now: datetime) -> bool:
    """Whether a gateway is registered for the lease: it must be before it connects (rule 10, docs/rules.md#r10)."""
    lease, live = worker.lease, live_registrations(worker, registered_until, now)
    return lease is not None and any(entry.lease_id == lease.id for entry, _ in live)


def _reason(silence: Silence, quiet: timedelta) -> str:
    if silence.lost:
        return f"{silence.lost}, so buildkitd was ended"
    return f"buildkitd has not answered for {quiet.total_seconds():.0f} s, so it was ended"
