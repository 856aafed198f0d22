"""What an appliance that ends still waits for: the builds on its workers, in words.

It asks the API of the appliance that runs here, for a short time only: an appliance that hangs must not make `down`
hang. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from bkpool.cli.client import Client
from bkpool.core import durations
from bkpool.core.errors import BkpoolError

ANSWER_TIMEOUT = 2.0
"""Seconds that the API has for each answer."""
MOST_LINES = 10
"""Builds that are shown one by one; the others are counted."""


@dataclass(frozen=True, slots=True)
class OpenBuild:
    """A leased worker with open connections."""

    worker: str
    job: str
    holder: str
    connections: int
    since: datetime | None
    """When its lease began."""

    def line(self, now: datetime) -> str:
        """The build in one line."""
        job = f"job {self.job} of " if self.job else ""
        held = f", leased {_whole_seconds(now - self.since)} ago" if self.since else ""
        text = f"  {self.worker}: {job}{self.holder}, {_count(self.connections, 'connection')}{held}"
        return "".join(char for char in text if char.isprintable())  # the caller chose the job's name


@dataclass(frozen=True, slots=True)
class DrainView:
    """What is shown at one moment."""

    headline: str
    lines: tuple[str, ...] = ()

    @property
    def detail(self) -> str:
        """The lines below the headline."""
        return "\n".join(self.lines)


def look(until: datetime | None, now: datetime) -> DrainView:
    """Asks the appliance of this home what it waits for.

    Args:
        until: When it will cut its builds; None if it has not told.
        now: The time.
    """
    try:
        builds = open_builds(Client(only_here=True, answer_timeout=ANSWER_TIMEOUT))
    except BkpoolError:
        return DrainView("waiting for the appliance to end; its API does not answer")
    return view(builds, until, now)


def view(builds: list[OpenBuild], until: datetime | None, now: datetime) -> DrainView:
    """The words for these builds. Pure."""
    if not builds:
        return DrainView("waiting for the appliance to end")
    end = f", at most until {_clock_time(until)}" if until else ""
    how = "Ctrl-C stops waiting, `bkpool down --now` cuts them"
    lines = [build.line(now) for build in builds[:MOST_LINES]]
    if more := len(builds) - len(lines):
        lines.append(f"  and {more} more")
    return DrainView(f"waiting for {_count(len(builds), 'build')}{end}; {how}", tuple(lines))


def open_builds(client: Client) -> list[OpenBuild]:
    """The workers with open connections, those of the oldest leases first.

    Raises:
        BkpoolError: The API does not answer.
    """
    busy = [pool for pool in client.pools().get("pools", ()) if pool.get("connections")]
    found = [build for pool in busy for build in _of_pool(client.pool(pool["name"], pool["namespace"]))]
    return sorted(found, key=lambda build: (build.since is None, build.since, build.worker))


def _of_pool(pool: dict[str, Any]) -> Iterator[OpenBuild]:
    members = pool.get("members", ())
    for one in members:
        if one.get("connections"):
            yield OpenBuild(
                worker=str(one.get("name")),
                job=str(one.get("jobId") or ""),
                holder=str(one.get("requestedBy") or "somebody"),
                connections=int(one["connections"]),
                since=_moment(one.get("allocatedAt")),
            )
    if not any("connections" in one for one in members):  # an appliance of an earlier version
        yield OpenBuild(f"pool {pool.get('name')}", "", "somebody", int(pool["connections"]), None)


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (TypeError, ValueError):
        return None


def _clock_time(moment: datetime) -> str:
    return f"{moment.astimezone():%H:%M:%S}"


def _whole_seconds(span: timedelta) -> str:
    return durations.render(timedelta(seconds=max(0, int(span.total_seconds()))))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
