from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bkpool.core.errors import InvalidInput
from bkpool.core.names import FINALIZER
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.store import database
from bkpool.store.recent import LONGEST, MOST, RecentlyWritten
from bkpool.store.tables import Tables

NAME = Pool(metadata=Metadata(name="p")).key


class File:
    """The tables of a file, as the thread that writes has them, and as one that has written nothing has them."""

    def __init__(self, path: Path, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self._path, self._db = path, writer
        self.recent = RecentlyWritten()
        self.tables = Tables(writer, now=now, history=10_000, recent=self.recent)
        self.fresh = Tables(reader, now=now, history=10_000)

    def execute_here(self, statement: str) -> None:
        self._db.execute(statement)

    def execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self._path)) as db, db:
            db.execute(statement)


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def file(tmp_path) -> Iterator[File]:
    path = tmp_path / "state.db"
    database.prepare(path)
    with closing(database.connect(path)) as writer, closing(database.connect(path)) as reader:
        yield File(path, writer, reader)


def pool(**spec) -> Pool:
    return Pool(metadata=Metadata(name="p"), spec=PoolSpec.model_validate(spec))


def test_a_watch_does_not_read_what_was_just_written(file):
    written = [file.tables.create(pool())]
    written.append(file.tables.replace(written[-1].but(spec=PoolSpec.model_validate({"maxTokenTTL": "2h"}))))
    written.append(file.tables.replace_status(written[-1].but(status=written[-1].status.but(workers=1))))
    seen = [event.object for event in file.tables.events_after(Pool, 0).events]
    assert [one is other for one, other in zip(seen, written, strict=True)] == [True] * 3


def test_what_somebody_else_has_written_is_read(file):
    file.tables.create(pool())
    file.execute("UPDATE objects SET data = replace(data, '\"workers\":0', '\"workers\":7')")
    file.execute("UPDATE events SET data = replace(data, '\"workers\":0', '\"workers\":8')")
    assert file.tables.get(Pool, NAME).status.workers == 7
    assert file.tables.events_after(Pool, 0).events[0].object.status.workers == 8


def test_what_is_remembered_says_the_same_as_the_file(file):
    """After every change: a document that is remembered was not changed by a later one."""
    choose = random.Random(1)
    obj = file.tables.create(pool())
    for number in range(60):
        metadata = obj.metadata
        match choose.randrange(5):
            case 0:
                obj = file.tables.replace_status(obj.but(status=obj.status.but(workers=number)))
            case 1:
                labels = {"n": str(choose.randrange(2))}
                obj = file.tables.replace(obj.but(metadata=metadata.but(labels=labels)))
            case 2:
                obj = file.tables.replace(obj.but(metadata=metadata.but(finalizers=(FINALIZER,))))
            case 3 if metadata.finalizers:
                file.tables.delete(Pool, NAME, None, None)
                marked = file.tables.get(Pool, NAME)
                assert marked == file.fresh.get(Pool, NAME)
                file.tables.replace(marked.but(metadata=marked.metadata.but(finalizers=())))
                obj = file.tables.create(pool())
            case _:
                obj = file.tables.replace(obj)
        assert obj == file.fresh.get(Pool, NAME) == file.tables.get(Pool, NAME)
        labels = obj.metadata.labels
        assert file.tables.list(Pool, None, labels).items == (obj,)
        assert file.tables.list(Pool, None, {"n": "other"}).items == ()
    live, read = (tables.events_after(Pool, 0).events for tables in (file.tables, file.fresh))
    assert live == read
    assert len(live) > 30


def test_a_change_that_is_undone_leaves_what_was_there(file):
    obj = file.tables.create(pool())
    file.execute_here("BEGIN IMMEDIATE")
    file.tables.replace_status(obj.but(status=obj.status.but(workers=1)))
    file.execute_here("ROLLBACK")
    assert file.tables.get(Pool, NAME) == obj
    file.execute_here("BEGIN IMMEDIATE")
    again = file.tables.replace_status(obj.but(status=obj.status.but(workers=2)))
    file.execute_here("COMMIT")
    assert [event.object for event in file.tables.events_after(Pool, 0).events] == [obj, again]


def test_only_the_last_and_the_short_ones_are_remembered(file):
    long = pool().metadata.but(annotations={"a": "x" * LONGEST})
    obj = file.tables.create(pool().but(metadata=long))
    assert file.recent._by_text == {}
    obj = file.tables.replace(obj.but(metadata=obj.metadata.but(annotations={})))
    for number in range(MOST + 1):
        obj = file.tables.replace_status(obj.but(status=obj.status.but(workers=number)))
    assert len(file.recent._by_text) == MOST


def test_a_text_that_is_no_unicode_is_refused(file):
    with pytest.raises(InvalidInput, match="p has a text that is not Unicode"):
        file.tables.create(pool().but(metadata=pool().metadata.but(annotations={"a": "\ud800"})))
