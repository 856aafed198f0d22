from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.controller.oidc_configs import (
    Finding,
    OIDCConfigController,
    finding_without_check,
    found_keys,
    status_of,
    unreachable,
)
from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.errors import Conflict, NotFound, Unavailable
from bkpool.core.resource import Metadata
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.captured_logs import capture_logs

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
ISSUER, GITHUB = "https://issuer.example.com", "https://token.actions.githubusercontent.com"


def a_config(name: str = "c", **spec: object) -> OIDCConfig:
    given = {"issuer": ISSUER, "audience": "a", **spec}
    return OIDCConfig(metadata=Metadata(name=name), spec=OIDCConfigSpec.model_validate(given))


def conditions(config: OIDCConfig) -> dict[str, tuple[str, str]]:
    return {found.type: (found.status, found.reason) for found in config.status.conditions}


# --- the status ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({}, None),
        ({"enabled": False}, "Disabled"),
        ({"issuer": GITHUB}, "NeedsCondition"),
        ({"issuer": GITHUB, "enabled": False}, "Disabled"),
        ({"issuer": GITHUB, "conditions": [{"claim": "repository_owner", "values": ["acme"]}]}, None),
    ],
)
def test_an_issuer_whose_tokens_are_not_accepted_anyway_is_not_asked(spec, reason):
    finding = finding_without_check(a_config(**spec))
    assert (finding.reason if finding else None) == reason
    assert finding is None or not finding.ready


def test_a_status_has_the_finding_and_the_ignored_fields():
    status = status_of(a_config(), found_keys(2), NOW)
    assert (status.ready, status.message) == (True, "2 keys")
    assert found_keys(1).message == "1 key"
    assert conditions(a_config().but(status=status)) == {
        "IgnoredFields": ("False", "AsWanted"),
        "Ready": ("True", "AsWanted"),
    }
    secret = a_config(clientSecretRef={"name": "n"})
    ignored = status_of(secret, unreachable("away"), NOW).conditions
    assert [(one.type, one.status, one.reason, one.message) for one in ignored] == [
        ("IgnoredFields", "True", "NotImplemented", "spec.clientSecretRef"),
        ("Ready", "False", "IssuerUnreachable", "away"),
    ]


def test_the_time_of_a_condition_moves_only_with_its_status():
    first = a_config().but(status=status_of(a_config(), found_keys(1), NOW))
    same = status_of(first, found_keys(1), LATER)
    assert same == first.status
    more = status_of(first, found_keys(2), LATER)
    assert more.message == "2 keys"
    assert {one.last_transition_time for one in more.conditions} == {NOW}
    away = status_of(first, unreachable("away"), LATER)
    assert [one.last_transition_time for one in away.conditions] == [NOW, LATER]
    worse = status_of(first.but(status=away), Finding("NeedsCondition", "x"), LATER + timedelta(hours=1))
    assert [one.last_transition_time for one in worse.conditions] == [NOW, LATER]


# --- writing it -----------------------------------------------------------------------------------------------------


class Issuers:
    """What each issuer answers: a number of keys, an error, or (for an event) one key once the event is set."""

    def __init__(self) -> None:
        self.keys: dict[str, int | Exception | asyncio.Event] = {ISSUER: 2}
        self.asked: list[str] = []

    async def probe(self, issuer: str) -> int:
        self.asked.append(issuer)
        answer = self.keys[issuer]
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return 1
        if isinstance(answer, Exception):
            raise answer
        return answer


class Busy:
    """A store whose writes of a status fail with the given errors first."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.troubles: list[Exception] = []
        self.writes = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    async def replace_status(self, obj: OIDCConfig) -> OIDCConfig:
        self.writes += 1
        if self.troubles:
            raise self.troubles.pop(0)
        return await self.store.replace_status(obj)


class RunningController:
    def __init__(self, store: SqliteStore, mirror: Mirror) -> None:
        self.store, self.mirror = store, mirror
        self.issuers, self.busy = Issuers(), Busy(store)
        self.now = NOW
        self.task: asyncio.Task | None = None

    def start(self, every: timedelta = timedelta(minutes=10)) -> None:
        keeper = OIDCConfigController(self.busy, self.mirror, self.issuers.probe, lambda: self.now, every)
        self.task = asyncio.create_task(keeper.run())

    async def change(self, name: str = "c", **spec: object) -> None:
        current = await self.store.get(OIDCConfig, "default", name)
        await self.store.replace(current.but(spec=a_config(**spec).spec))

    async def until(self, condition: Callable[[OIDCConfig], object], name: str = "c") -> OIDCConfig:
        """Waits until the condition holds and returns the configuration."""
        changed = asyncio.Event()
        unsubscribe = self.mirror.on_config(changed.set)
        key = a_config(name).key
        try:
            async with asyncio.timeout(60):
                while not ((found := self.mirror.configs.get(key)) and condition(found)):
                    await changed.wait()
                    changed.clear()
        finally:
            unsubscribe()
        return found


@pytest.fixture
async def kept(tmp_path) -> AsyncIterator[RunningController]:
    store = await SqliteStore.open(tmp_path / "state.db")
    mirror = Mirror(store, configs=True)
    following = asyncio.create_task(mirror.run())
    await mirror.ready.wait()
    world = RunningController(store, mirror)
    yield world
    tasks = [following, *([world.task] if world.task else [])]
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in ended)
    await store.close()


async def test_the_status_of_each_issuer_is_written_at_first_and_after_each_change(kept):
    await kept.store.create(a_config())
    kept.start()
    first = await kept.until(lambda config: config.status.ready)
    assert (first.status.message, first.status.observed_generation) == ("2 keys", 1)

    await kept.change(issuer=GITHUB)
    refused = await kept.until(lambda config: config.status.observed_generation == 2)
    assert conditions(refused)["Ready"] == ("False", "NeedsCondition")
    assert "strangers would be let in" in refused.status.message

    await kept.change(enabled=False)
    disabled = await kept.until(lambda config: config.status.observed_generation == 3)
    assert (disabled.status.ready, disabled.status.message) == (False, "disabled")
    assert kept.issuers.asked == [ISSUER], "an issuer whose tokens are not accepted is not asked"

    await kept.store.create(a_config("another"))
    await kept.until(lambda config: config.status.ready, "another")


async def test_an_unreachable_or_slow_issuer_does_not_delay_the_others(kept):
    answer = kept.issuers.keys["https://slow.example.com"] = asyncio.Event()
    kept.issuers.keys["https://away.example.com"] = Unavailable("away.example.com does not answer")
    kept.issuers.keys["https://odd.example.com"] = KeyError("a bug")
    for name in ("slow", "away", "odd"):
        await kept.store.create(a_config(name, issuer=f"https://{name}.example.com"))
    await kept.store.create(a_config())
    with capture_logs():
        kept.start()
        await kept.until(lambda config: config.status.ready)
        away = await kept.until(lambda config: config.status.conditions, "away")
        odd = await kept.until(lambda config: config.status.conditions, "odd")
    assert away.status.message == "away.example.com does not answer"
    assert conditions(away)["Ready"] == conditions(odd)["Ready"] == ("False", "IssuerUnreachable")
    slow = await kept.until(lambda _config: True, "slow")
    assert slow.status.conditions == ()
    answer.set()
    await kept.until(lambda config: config.status.ready, "slow")


async def test_it_checks_at_intervals_and_writes_only_changes(kept):
    await kept.store.create(a_config())
    kept.start(every=timedelta(milliseconds=1))
    first = await kept.until(lambda config: config.status.ready)
    kept.now, checks = LATER, len(kept.issuers.asked)
    seen = asyncio.Event()

    async def probe(issuer: str, ask=kept.issuers.probe) -> int:
        if len(kept.issuers.asked) > checks + 3:
            seen.set()
        return await ask(issuer)

    kept.task.cancel()
    await asyncio.gather(kept.task, return_exceptions=True)
    keeper = OIDCConfigController(kept.busy, kept.mirror, probe, lambda: kept.now, timedelta(milliseconds=1))
    kept.task = asyncio.create_task(keeper.run())
    async with asyncio.timeout(60):
        await seen.wait()
    assert kept.busy.writes == 1, "a check with the same result writes nothing, even after a restart"
    kept.issuers.keys[ISSUER] = Unavailable("away")
    later = await kept.until(lambda config: not config.status.ready)
    assert int(later.metadata.resource_version) > int(first.metadata.resource_version)
    assert [one.last_transition_time for one in later.status.conditions] == [NOW, LATER]


async def test_a_conflict_is_retried_at_once_and_an_unavailable_store_later(kept):
    kept.busy.troubles = [Conflict("changed"), Conflict("changed"), Unavailable("away"), NotFound("gone")]
    await kept.store.create(a_config())
    kept.start(every=timedelta(milliseconds=1))
    await kept.until(lambda config: config.status.ready)
    assert kept.busy.writes == 5


async def test_a_finding_about_an_older_configuration_is_not_written_to_a_newer_one(kept):
    answer = kept.issuers.keys["https://slow.example.com"] = asyncio.Event()
    await kept.store.create(a_config(issuer="https://slow.example.com"))
    kept.start()
    async with asyncio.timeout(60):
        while not kept.issuers.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await kept.change(enabled=False)
    answer.set()
    disabled = await kept.until(lambda config: config.status.conditions)
    assert disabled.status.message == "disabled"
    assert kept.busy.writes == 1


async def test_a_configuration_that_is_deleted_and_created_again_is_checked_again(kept):
    await kept.store.create(a_config())
    kept.start()
    first = await kept.until(lambda config: config.status.ready)
    await kept.store.delete(OIDCConfig, *first.key)
    await kept.store.create(a_config())
    second = await kept.until(lambda config: config.uid != first.uid and config.status.ready)
    assert second.status.observed_generation == 1
