"""How many buildkitd processes may start at once, how long one may take to start and to end, and its files to change.

Nothing here enforces a limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from bkpool.workers.health import DEFAULT_PROBES, ProbeLimits


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """All limits of buildkitd processes; times are in seconds. Tests use shorter ones."""

    concurrent_starts: int = 4
    """How many daemons may be starting at once."""
    start_timeout: float = 60.0
    """Until a daemon must have answered; it takes less than one second where nothing is wrong."""
    adopt_timeout: float = 5.0
    """For an answer of a daemon that an earlier run has started. One that does not answer is ended."""
    stop_timeout: float = 10.0
    """Between SIGTERM and SIGKILL."""
    probes: ProbeLimits = DEFAULT_PROBES
    """Of daemons that are up."""
    log_size: int = 5 * 1024 * 1024
    """Bytes of a daemon's log, and of the earlier part that is kept."""
    file_timeout: float = 60.0
    """For the files of a slot around a start or an end, and for a record."""
    concurrent_wipes: int = 4
    """How many caches may be removed at once."""
    wipe_timeout: float = 1800.0
    """To remove a cache. What is left then is removed by the next attempt."""
