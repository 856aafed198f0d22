"""Random histories: the store and its watch must agree with a model in a dictionary."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bkpool.core.errors import Conflict, NotFound
from bkpool.core.pool import Pool, PoolSpec, PoolStatus, Scaling
from bkpool.core.resource import Metadata
from bkpool.store.sqlite import SqliteStore
from support.examples import examples

NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(1, 3)


@dataclass(frozen=True)
class Known:
    """What the model knows of one object."""

    spec: int
    status: int
    generation: int
    finalizers: tuple[str, ...]
    deleting: bool = False


def model_of(pool: Pool) -> Known:
    return Known(
        pool.spec.scaling.max,
        pool.status.workers,
        pool.metadata.generation,
        pool.metadata.finalizers,
        pool.metadata.deletion_timestamp is not None,
    )


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "state.db"
        self.store = self.run(SqliteStore.open(self.path, history=15))
        self.known: dict[str, Known] = {}
        self.last: dict[str, Pool] = {}
        self.stale: list[Pool] = []
        self.begin_watch()

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()
        self.directory.cleanup()

    @rule(name=NAMES, spec=NUMBERS, finalizers=st.sampled_from([(), ("x/f",)]))
    def create(self, name, spec, finalizers) -> None:
        obj = Pool(metadata=Metadata(name=name, finalizers=finalizers), spec=PoolSpec(scaling=Scaling(max=spec)))
        if name in self.known:
            with pytest.raises(Conflict):
                self.run(self.store.create(obj))
        else:
            self.last[name] = self.run(self.store.create(obj))
            self.known[name] = Known(spec, 0, 1, finalizers)

    @rule(name=NAMES, spec=NUMBERS, release=st.booleans())
    def replace(self, name, spec, release) -> None:
        if name not in self.known:
            return
        was, obj = self.known[name], self.last[name]
        changed = obj.but(spec=obj.spec.but(scaling=Scaling(max=spec)), status=PoolStatus(workers=77))
        finalizers = () if release else was.finalizers
        changed = changed.but(metadata=obj.metadata.but(finalizers=finalizers))
        self.wrote(obj, self.run(self.store.replace(changed)))
        if was.deleting and not finalizers:
            del self.known[name], self.last[name]
        else:
            generation = was.generation + (spec != was.spec)
            self.known[name] = replace(was, spec=spec, generation=generation, finalizers=finalizers)

    @rule(name=NAMES, status=NUMBERS)
    def replace_status(self, name, status) -> None:
        if name in self.known:
            obj = self.last[name]
            changed = obj.but(status=PoolStatus(workers=status), spec=obj.spec.but(scaling=Scaling(max=77)))
            self.wrote(obj, self.run(self.store.replace_status(changed)))
            self.known[name] = replace(self.known[name], status=status)

    @rule(name=NAMES)
    def delete(self, name) -> None:
        if name not in self.known:
            with pytest.raises(NotFound):
                self.run(self.store.delete(Pool, "default", name))
            return
        was = self.known[name]
        self.run(self.store.delete(Pool, "default", name))
        if not was.finalizers:
            del self.known[name], self.last[name]
        elif not was.deleting:
            self.stale.append(self.last[name])
            self.last[name] = self.run(self.store.get(Pool, "default", name))
            self.known[name] = replace(was, deleting=True, generation=was.generation + 1)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def write_what_is_stale(self, data) -> None:
        obj = data.draw(st.sampled_from(self.stale))
        for write in (self.store.replace, self.store.replace_status):
            with pytest.raises((Conflict, NotFound)):
                self.run(write(obj))

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.store = self.run(SqliteStore.open(self.path, history=15))

    @rule()
    def begin_watch(self) -> None:
        listing = self.run(self.store.list(Pool))
        self.watched = {p.key.name: p for p in listing.items}
        self.since = listing.resource_version

    @invariant()
    def the_list_is_the_model(self) -> None:
        listed = self.run(self.store.list(Pool)).items
        assert {p.key.name: model_of(p) for p in listed} == self.known
        assert {p.key.name: p for p in listed} == self.last

    @invariant()
    def the_watch_leads_to_the_list(self) -> None:
        self.run(self.follow())
        assert self.watched == self.last

    async def follow(self) -> None:
        newest = (await self.store.list(Pool)).resource_version
        if self.since == newest:
            return
        async with asyncio.timeout(60), aclosing(self.store.watch(Pool, self.since)) as watch:
            async for event in watch:
                assert int(event.object.metadata.resource_version) > int(self.since)
                self.since = event.object.metadata.resource_version
                if event.type == "DELETED":
                    del self.watched[event.object.key.name]
                else:
                    assert (event.type == "ADDED") == (event.object.key.name not in self.watched)
                    self.watched[event.object.key.name] = event.object
                if self.since == newest:
                    return

    def wrote(self, before: Pool, after: Pool) -> None:
        if after != before:
            self.stale.append(before)
        self.last[before.key.name] = after


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=examples(15), stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
