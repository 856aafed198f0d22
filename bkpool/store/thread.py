"""A thread that owns one SQLite connection and runs queued commands together in a transaction (group commit).

Twenty claims at once cost one fsync. Where more wait than one transaction has, pools have turns: a pool of which a
thousand workers are written does not make the others wait for all of them. A command is answered only after its
commit. A command that fails is undone alone; an error of the disk undoes the whole transaction. Whatever
fails, every command is answered.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Collection, Hashable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from bkpool.core.errors import Unavailable
from bkpool.store import database
from bkpool.store.in_turn import InTurn
from bkpool.store.tables import Tables

log = structlog.get_logger(__name__)

CHECKPOINT_DELAY = 0.5
"""Seconds without a command after which the write-ahead log is copied into the database file."""

MOST_TOGETHER = 64
"""Commands of one transaction. So many take some 50 ms: a command of another pool waits for that and for its own."""

T = TypeVar("T")
Command = Callable[[Tables], T]


class _Job(NamedTuple):
    command: Command[Any]
    future: asyncio.Future[Any]
    group: Hashable


class _Outcome(NamedTuple):
    future: asyncio.Future[Any]
    value: Any = None
    error: Exception | None = None


class SqlThread:
    """Runs commands for the event loop that created it.

    Args:
        path: The database.
        tables: The argument of every command.
        db: The connection of `tables`; closed with the thread.
        begin: The statement that opens a transaction: "BEGIN" to read, "BEGIN IMMEDIATE" to write.
        on_commit: Called in the loop after each commit, before its commands are answered, with the kinds that were
            written.
        name: Of the thread.
    """

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        tables: Tables,
        begin: str,
        on_commit: Callable[[Collection[str]], None],
        *,
        name: str,
    ) -> None:
        self._path = path
        self._db = db
        self._tables = tables
        self._begin = begin
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._written = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    async def run(self, command: Command[T], group: Hashable = None) -> T:
        """Runs a command and returns when its result is durable.

        Args:
            command: What to do. Commands of one group are run in the order of these calls.
            group: What has turns: the pool that the command is about.

        Raises:
            Unavailable: The thread has been closed, or has failed.
            BkpoolError: What the command raises, or an error of the file or the disk.
        """
        if self._closed:
            raise Unavailable("the store is closed", hint="The appliance is stopping: try again when it runs.")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Job(command, future, group))
        if self._ended.is_set():
            self._refuse_queued()
        return await future

    async def close(self) -> None:
        """Finishes the queued commands, then ends the thread and closes the connection."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _main(self) -> None:
        try:
            with closing(self._db):
                self._serve()
        finally:
            self._ended.set()
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                self._loop.call_soon_threadsafe(self._refuse_queued)

    def _refuse_queued(self) -> None:
        """Answers the commands that no thread will run. Called in the loop."""
        with suppress(queue.Empty):
            while True:
                job = self._queue.get_nowait()
                if job is not None and not job.future.done():
                    job.future.set_exception(
                        Unavailable("the store has ended", hint="`bkpool logs` shows why; `bkpool up` starts again.")
                    )

    def _serve(self) -> None:
        waiting: InTurn[_Job] = InTurn()
        last = False
        try:
            while waiting or not last:
                if not waiting:
                    last = self._fetch(waiting, self._next())
                with suppress(queue.Empty):
                    while True:
                        last = self._fetch(waiting, self._queue.get_nowait()) or last
                outcomes = self._transaction(waiting.take(MOST_TOGETHER))
                touched, self._tables.touched = self._tables.touched, set()
                with suppress(RuntimeError):  # the loop is closed, and nobody waits for the results
                    self._loop.call_soon_threadsafe(self._resolve, outcomes, touched)
        finally:  # the thread ends, and has left nothing if it ends in order
            for job in waiting.take():
                self._queue.put(job)

    @staticmethod
    def _fetch(waiting: InTurn[_Job], job: _Job | None) -> bool:
        """Lets a job wait for the turn of its group. Returns whether it was the last one."""
        if job is not None:
            waiting.put(job.group, job)
        return job is None

    def _next(self) -> _Job | None:
        """The next job. In the first pause after writes, it copies the log into the file, while no command waits."""
        if self._written:
            try:
                return self._queue.get(timeout=CHECKPOINT_DELAY)
            except queue.Empty:
                self._written = False
                with suppress(sqlite3.Error):  # SQLite does it itself when the log has grown
                    self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        return self._queue.get()

    def _transaction(self, jobs: list[_Job]) -> list[_Outcome]:
        try:
            outcomes = self._run_all(jobs)
            if outcomes is None:  # one of them has failed half-way
                outcomes = self._run_each_apart(jobs)
            if self._tables.touched:
                self._written = True
                self._tables.compact()
            self._db.execute("COMMIT")
        except Exception as error:
            self._tables.touched.clear()
            with suppress(sqlite3.Error):
                self._db.rollback()
            if isinstance(error, sqlite3.Error):
                log.warning("store.transaction_failed", path=str(self._path), error=str(error), commands=len(jobs))
                error = database.fault(error, self._path)
            else:
                log.exception("store.crashed", path=str(self._path))
            return [_Outcome(job.future, error=error) for job in jobs]
        except BaseException:  # the thread ends
            for job in jobs:
                self._queue.put(job)
            raise
        return outcomes

    def _run_all(self, jobs: list[_Job]) -> list[_Outcome] | None:
        """Begins a transaction and runs the commands in it. None: all is undone, because one failed half-way.

        Most that fail have changed nothing yet. So they need no savepoint, of which each statement may have to wait
        until another thread lets this one run.
        """
        self._start_transaction()
        outcomes = []
        for job in jobs:
            changes = self._db.total_changes
            outcomes.append(self._run(job))
            if outcomes[-1].error is not None and self._db.total_changes != changes:
                self._db.rollback()
                return None
        return outcomes

    def _run_each_apart(self, jobs: list[_Job]) -> list[_Outcome]:
        """Begins a transaction and runs the commands in it. Whatever one has changed that failed is undone."""
        self._start_transaction()
        outcomes = []
        for job in jobs:
            self._db.execute("SAVEPOINT command")
            touched = set(self._tables.touched)
            outcomes.append(self._run(job))
            if outcomes[-1].error is not None:
                self._db.execute("ROLLBACK TO command")
                self._tables.begins()
                self._tables.touched = touched
            self._db.execute("RELEASE command")
        return outcomes

    def _start_transaction(self) -> None:
        self._tables.touched.clear()
        self._tables.begins()
        self._db.execute(self._begin)

    def _run(self, job: _Job) -> _Outcome:
        try:
            return _Outcome(job.future, job.command(self._tables))
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - the caller gets it
            return _Outcome(job.future, error=error)

    def _resolve(self, outcomes: list[_Outcome], touched: Collection[str]) -> None:
        if touched:
            self._on_commit(touched)
        for future, value, error in outcomes:
            if future.done():  # the caller was cancelled
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
