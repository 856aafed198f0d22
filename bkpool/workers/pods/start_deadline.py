"""How long a pod may take to come up, and when what it waits for is worth telling: pure, with time as an argument."""

from __future__ import annotations

from dataclasses import dataclass

from bkpool.workers.pods.pod_view import Stage, View

_UNTOLD = 5.0
"""Seconds of an ordinary wait that nobody needs to hear of: a pod whose image is there is up in one or two."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a pod may stay in each stage, before its start has failed."""

    scheduling: float = 600.0
    """An autoscaler has this long to bring a node; theirs take one to five minutes."""
    pulling: float = 120.0
    """From the first refusal. The kubelet tries again after 10, 20 and 40 s: so long may a registry be away."""
    creating: float = 600.0
    """Volumes are attached and the image is being pulled: a few hundred MB over a slow line."""
    answering: float = 60.0
    """From its container's start until buildkitd answers; it takes half a second where nothing is wrong."""
    ending: float = 60.0
    """Until a pod or a volume that is being deleted is gone; a healthy node takes two seconds."""

    def of(self, stage: Stage) -> float:
        """The deadline of a stage of the start."""
        by_stage = {Stage.SCHEDULING: self.scheduling, Stage.PULLING: self.pulling, Stage.CREATING: self.creating}
        return by_stage.get(stage, self.answering)


class StartDeadline:
    """One start: in which stage it is since when, and what has been told of it."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._stage: Stage | None = None
        self._since = 0.0
        self._told = ""

    def look(self, view: View, now: float) -> str | None:
        """Takes note of a view, and returns what is to be told now; None: nothing new."""
        if view.stage is not self._stage:
            self._stage, self._since = view.stage, now
        worth = view.message if view.trouble or now - self._since >= _UNTOLD else ""
        if worth == self._told:
            return None
        self._told = worth
        return worth

    def ended(self, view: View, now: float) -> bool:
        """Whether it is of no use to wait any longer."""
        return view.final or now - self._since >= self._deadlines.of(view.stage)

    def left(self, now: float) -> float:
        """Seconds until time alone changes something."""
        past = now - self._since
        deadline = self._deadlines.of(self._stage or Stage.SCHEDULING)
        return max(0.0, min(deadline, _UNTOLD if past < _UNTOLD else deadline) - past)
