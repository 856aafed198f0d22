"""How long a pod may take to start, and when what it waits for is worth a report. Pure: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from bkpool.workers.pods.pod_view import Stage, View

_ORDINARY_WAIT = 5.0
"""Seconds of waiting that are not reported: a pod whose image is on the node starts in one or two."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a pod may stay in each stage before its start has failed."""

    scheduling: float = 600.0
    """For an autoscaler to bring a node; they take one to five minutes."""
    pulling: float = 120.0
    """From the first refusal. The kubelet tries again after 10, 20 and 40 s, so a registry may be away that long."""
    creating: float = 600.0
    """For volumes to be attached and the image to be pulled: a few hundred MB over a slow line."""
    answering: float = 60.0
    """From the container's start until buildkitd answers; it takes half a second where nothing is wrong."""
    ending: float = 60.0
    """Until a pod or a volume that is being deleted is gone; a healthy node takes two seconds."""

    def of(self, stage: Stage) -> float:
        """The deadline of a stage of the start."""
        by_stage = {Stage.SCHEDULING: self.scheduling, Stage.PULLING: self.pulling, Stage.CREATING: self.creating}
        return by_stage.get(stage, self.answering)


class StartDeadline:
    """One start: its stage, when that began, and what was reported last."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._stage: Stage | None = None
        self._since = 0.0
        self._reported = ""

    def message_to_report(self, view: View, now: float) -> str | None:
        """Takes note of a view.

        Args:
            view: How far the pod has come.
            now: Seconds, of any clock that does not jump.

        Returns:
            What to report now; "" if nothing is waited for any more; None if there is nothing new.
        """
        if view.stage is not self._stage:
            self._stage, self._since = view.stage, now
        message = view.message if view.trouble or now - self._since >= _ORDINARY_WAIT else ""
        if message == self._reported:
            return None
        self._reported = message
        return message

    def has_passed(self, view: View, now: float) -> bool:
        """Whether the start has failed: for ever, or because the stage has taken too long."""
        return view.final or now - self._since >= self._deadlines.of(view.stage)

    def time_to_change(self, now: float) -> float:
        """Seconds until the passing of time alone changes one of the two answers above."""
        past = now - self._since
        deadline = self._deadlines.of(self._stage or Stage.SCHEDULING)
        return max(0.0, min(deadline, _ORDINARY_WAIT if past < _ORDINARY_WAIT else deadline) - past)
