"""Judges a chaos run: reads its history, a list of events, and finds what must never happen.

It is pure, and follows Jepsen: it uses what the clients, the builds in the workers and the driver have seen. It never
asks bkpool whether bkpool was right. `chaos.run` records the history. docs/testing.md explains the rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

PROMPT = 5.0
"""Seconds within which a failure must follow its cause (docs/testing.md, "Chaos: what is checked")."""
HELD = 15.0 + 12.0 + PROMPT
"""Seconds until a build must be connected or refused: two waits for the worker (docs/clients.md#waiting)."""
HUNG = 90.0
"""Seconds after which a build counts as one that would never end. The longest build takes 3 s by itself."""
RECOVERY = 30.0
"""Seconds after the kill of a worker in which new connections to it may fail."""

SEVERS = {"kill-appliance": 0.0, "kill-worker": 0.0, "delete-pod": 0.0, "hang-worker": 20.0}
"""Faults that end open builds, all of them or those on one worker, and the seconds that this may take. A worker
counts as hung after 15 s without an answer or a byte; its clients are told within 5 s of that."""
SILENT = {"kill-appliance": math.inf, "end-appliance": math.inf, "hang-worker": SEVERS["hang-worker"]}
"""Faults in which nobody answers a build that is not connected, and for how many seconds at most. They do not count
for HELD: the appliance drains, is away and starts, or the gateway waits for a byte of the worker."""
GENTLE = {"end-appliance", "stop-worker", "expire-watches", "freeze-watches", "cut-api", "unread-log"}
"""Faults that must not make an open build fail. The appliance drains, or the build was connected before, or it pauses
and then continues. A worker that is stopped for some seconds looks like a slow one, so its builds must not be
ended."""
UNNOTICED = {"unread-log"}
"""Faults that nobody but the reader of the log may notice: they explain no failure and no refusal."""


@dataclass(frozen=True)
class Event:
    """Something that was seen: at which time (seconds since the run began), by whom, what, and details."""

    at: float
    who: str
    what: str
    of: dict[str, Any] = field(default_factory=dict)


def dump(events: Iterable[Event]) -> str:
    """Returns the events as JSON lines."""
    return "".join(json.dumps(asdict(event), ensure_ascii=False) + "\n" for event in events)


def load(text: str) -> list[Event]:
    """Reads the result of `dump`."""
    return [Event(**json.loads(line)) for line in text.splitlines()]


@dataclass(frozen=True)
class Hold:
    """A lease as its holder sees it: from the answer until the request to release it."""

    who: str
    lease: str
    worker: str
    begin: float
    end: float


@dataclass(frozen=True)
class Build:
    """One `buildx build`, from its start to its end."""

    who: str
    name: str
    worker: str
    begin: float
    connected: float | None
    """Time of the first output of BuildKit; None if there was none."""
    end: float
    ok: bool
    of: dict[str, Any]


@dataclass(frozen=True)
class Harm:
    """One fault, and the time until which failures may be its effect."""

    kind: str
    worker: str
    """The worker that it affects; empty for all."""
    begin: float
    done: float
    """Time at which it was carried out. It cut connections between `begin` and this time."""
    end: float


def judge(events: Iterable[Event]) -> list[str]:
    """Returns every violation as a sentence with its time; an empty list if the run was right."""
    seen = sorted(events, key=lambda event: event.at)
    return [*_holders(seen), *_witnesses(seen), *_waiters(seen), *_builds(seen), *_aftermath(seen)]


# --- what the events mean -------------------------------------------------------------------------------------------


def holds(events: Iterable[Event]) -> list[Hold]:
    """Returns who held which worker at which time.

    If a lease was lost, it is only certain that the client held it at the beginning.
    """
    last = 0.0
    begun: dict[str, Event] = {}
    ended: dict[str, float] = {}
    for event in events:
        last = max(last, event.at)
        lease = str(event.of.get("lease", ""))
        if event.what == "answer" and event.of["outcome"] == "lease":
            begun.setdefault(lease, event)
        elif event.what == "build-end" and event.of.get("lost"):
            ended[lease] = begun[lease].at
        elif event.what == "release" and lease in begun:
            ended.setdefault(lease, event.at)
    return [
        Hold(event.who, lease, event.of["worker"], event.at, ended.get(lease, last)) for lease, event in begun.items()
    ]


def builds(events: Iterable[Event]) -> list[Build]:
    """Returns every build that has ended, in the order of the ends."""
    begun: dict[str, Event] = {}
    made = []
    for event in events:
        if event.what == "build":
            begun[event.of["build"]] = event
        elif event.what == "build-end":
            first = begun[event.of["build"]]
            times = (first.at, event.of["connected"], event.at)
            made.append(
                Build(event.who, event.of["build"], event.of["worker"], *times, ok=event.of["ok"], of=event.of)
            )
    return made


def harms(events: Iterable[Event]) -> list[Harm]:
    """Returns every fault that was carried out. A fault without an end lasts until the last event."""
    last = 0.0
    begun: dict[int, Event] = {}
    done: dict[int, float] = {}
    ended: dict[int, float] = {}
    for event in events:
        last = max(last, event.at)
        if event.what == "fault":
            begun[event.of["number"]] = event
        elif event.what == "fault-done":
            done[event.of["number"]] = event.at
        elif event.what == "fault-end":
            ended[event.of["number"]] = event.at
    return [
        Harm(event.of["kind"], event.of["worker"], event.at, done.get(number, event.at), ended.get(number, last))
        for number, event in begun.items()
    ]


def stragglers(events: list[Event]) -> list[str]:
    """Returns builds whose lease had ended, and whose step still ran beside a step of the next holder."""
    return [text for text, overlap in _beside(events) if not overlap]


# --- never two holders ----------------------------------------------------------------------------------------------


def _holders(events: list[Event]) -> Iterator[str]:
    by_worker: dict[str, list[Hold]] = {}
    for hold in holds(events):
        by_worker.setdefault(hold.worker, []).append(hold)
    for worker, of_it in by_worker.items():
        of_it.sort(key=lambda hold: hold.begin)
        for number, first in enumerate(of_it):
            for second in of_it[number + 1 :]:
                if second.begin < first.end:
                    yield (
                        f"{second.begin:.2f}: {worker} was given to {second.who} ({second.lease}) while {first.who} "
                        f"({first.lease}) held it until {first.end:.2f}"
                    )


def _witnesses(events: list[Event]) -> Iterator[str]:
    yield from (text for text, overlap in _beside(events) if overlap)
    for build in builds(events):
        mine = tenant(build.name)
        for other in build.of.get("before", []):
            if tenant(other) != mine:
                yield f"{build.end:.2f}: {build.name} found in its cache what {other} of another tenant had left"


def _beside(events: list[Event]) -> Iterator[tuple[str, bool]]:
    """Yields each other build that a build saw at work in its cache, and whether that is a violation.

    It is one if the other holder still had the worker at that time, or is another tenant.
    """
    by_lease = {hold.lease: hold for hold in holds(events)}
    all_builds = {build.name: build for build in builds(events)}
    for build in all_builds.values():
        mine = by_lease[build.of["lease"]]
        for name in build.of.get("beside", []):
            other = all_builds.get(name)
            if other is None:
                yield f"{build.end:.2f}: {build.name} saw {name} at work beside it, which no client has started", True
                continue
            its = by_lease[other.of["lease"]]
            if its.lease == mine.lease:
                continue  # an earlier try of the same holder
            overlap = its.end > mine.begin and mine.end > its.begin
            wrong = overlap or tenant(name) != tenant(build.name)
            yield f"{build.end:.2f}: {build.name} saw {name} at work beside it on {build.worker}", wrong


def tenant(name: str) -> str:
    """Returns the tenant of a build. The name of the build begins with it."""
    return name.partition(".")[0]


# --- every waiter answered ------------------------------------------------------------------------------------------


def _waiters(events: list[Event]) -> Iterator[str]:
    asked: dict[str, Event] = {}
    faults = [harm for harm in harms(events) if harm.kind not in UNNOTICED]
    for event in events:
        if event.what in {"ask", "release"}:
            asked[event.of["call"]] = event
        elif event.what in {"answer", "released"}:
            first = asked.pop(event.of["call"])
            yield from _answered(first, event, faults)
    for event in asked.values():
        yield f"{event.at:.2f}: {event.who} asked ({event.what}) and was never answered"


def _answered(asked: Event, answer: Event, faults: list[Harm]) -> Iterator[str]:
    took, outcome = answer.at - asked.at, answer.of["outcome"]
    message = answer.of.get("message", "")
    what = f"{answer.at:.2f}: {answer.who}, who asked at {asked.at:.2f} ({asked.what}),"
    if took > answer.of["wait"] + PROMPT:
        yield f"{what} waited {took:.1f} s"
    if outcome in {"lease", "released", "over"}:
        return
    if outcome == "refused" and not is_sentence(message):
        yield f"{what} was refused without a sentence: {message!r}"
    if outcome == "refused":
        causes = [harm for harm in faults if _touches(harm, asked.at - RECOVERY, answer.at)]
    else:  # the connection was cut
        causes = [
            harm
            for harm in faults
            if harm.kind in {"kill-appliance", "end-appliance"} and _touches(harm, answer.at - PROMPT, answer.at)
        ]
    if not causes:
        yield f"{what} was {outcome} with no fault to cause it: {message}"


# --- builds ---------------------------------------------------------------------------------------------------------


def _builds(events: list[Event]) -> Iterator[str]:
    faults = [harm for harm in harms(events) if harm.kind not in UNNOTICED]
    for build in builds(events):
        what = f"{build.end:.2f}: build {build.name} on {build.worker}"
        if build.of.get("hung"):
            yield f"{what} never ended: it was given up after {build.end - build.begin:.0f} s"
            continue
        if build.ok and not build.of["correct"]:
            yield f"{what} succeeded with a wrong result"
        if not build.ok and not is_sentence(build.of["sentence"]):
            yield f"{what} failed without a sentence: {build.of['sentence']!r}"
        if not build.ok and not _has_cause(build, faults):
            yield f"{what} failed with no fault to cause it: {build.of['sentence']}"
        yield from _late(build, faults, what)


def _has_cause(build: Build, faults: list[Harm]) -> bool:
    """Returns whether a fault explains that this build failed at that time."""
    if build.connected is None:
        return any(_concerns(harm, build) and _touches(harm, build.begin - RECOVERY, build.end) for harm in faults)
    return any(
        _concerns(harm, build) and harm.kind not in GENTLE and harm.begin <= build.end <= harm.end + PROMPT
        for harm in faults
    )


def _late(build: Build, faults: list[Harm], what: str) -> Iterator[str]:
    """Yields builds that ended too late.

    A build that is cut must end at once. A build that is not connected must end after the waits at the gateway.
    """
    if build.connected is None:
        if not build.ok and build.end - build.begin - _silence(build, faults) > HELD:
            yield f"{what} was not connected, and ended only after {build.end - build.begin:.1f} s"
        return
    for harm in faults:
        within = SEVERS.get(harm.kind)
        if within is None or not _concerns(harm, build) or build.connected >= harm.begin:
            continue
        if build.end > harm.done + within + PROMPT:
            yield f"{what} was cut by {harm.kind} at {harm.done:.2f} and ended {build.end - harm.done:.1f} s later"


def _silence(build: Build, faults: list[Harm]) -> float:
    """Returns the seconds of this build in which a fault kept everybody from answering it."""
    spans = sorted(
        (max(harm.begin, build.begin), min(harm.end, harm.begin + SILENT[harm.kind], build.end))
        for harm in faults
        if harm.kind in SILENT and _concerns(harm, build)
    )
    seconds, until = 0.0, build.begin
    for begin, end in spans:  # they may overlap
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds


def _concerns(harm: Harm, build: Build) -> bool:
    return harm.worker in {"", build.worker}


def _touches(harm: Harm, begin: float, end: float) -> bool:
    return harm.begin <= end and harm.end >= begin


_BARE = re.compile(r"Traceback|panic:|goroutine \d|^\s*File \"", re.MULTILINE)


def is_sentence(text: str) -> bool:
    """Returns whether a user can read this: it has words and is no traceback."""
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= 3 and not _BARE.search(text)


# --- afterwards -----------------------------------------------------------------------------------------------------


def _aftermath(events: list[Event]) -> Iterator[str]:
    """Yields what is left over, and who could not build again after the faults."""
    for event in events:
        if event.what == "left":
            yield f"{event.at:.2f}: left over: {event.of['text']}"
        elif event.what == "wrong":
            yield f"{event.at:.2f}: {event.of['text']}"
    if not any(event.what == "healed" for event in events):
        yield "after the faults the pool never recovered"
    calm = next((event.at for event in events if event.what == "calm"), None)
    if calm is None:
        yield "the run ended before the time without faults"
        return
    well = {build.who for build in builds(events) if build.ok and build.end > calm}
    for who in sorted({event.who for event in events if event.what == "ask"} - well):
        yield f"{who} had no successful build after the faults had ended"
