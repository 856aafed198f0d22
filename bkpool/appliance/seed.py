"""What a starting appliance writes into the store: the objects of the user's files, and nothing left of its last run.

It is called before anything follows the store. It decides nothing about leases or workers.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

import structlog

from bkpool.core.auth import OIDCConfig, OIDCConfigStatus
from bkpool.core.documents import Documents
from bkpool.core.errors import Conflict, NotFound
from bkpool.core.names import ANNOTATION_SOURCE, DEFAULT_POOL, Key
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.removal import FROM_FILE, OWN_ANNOTATIONS, being_removed, is_from_file, removal_of
from bkpool.core.resource import Metadata, Resource
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Worker
from bkpool.store import Store

log = structlog.get_logger(__name__)

P = TypeVar("P", Pool, OIDCConfig)


async def seed_objects(store: Store, wanted: Documents, *, only_source: bool, now: datetime) -> tuple[Key, ...]:
    """Creates or updates the objects of the user's files. If there is no pool at all, creates one called `default`.

    Args:
        store: Where the objects are written.
        wanted: The objects of the files.
        only_source: Objects come from the files and from nowhere else. An issuer that is not in the files is deleted,
            and so is no longer trusted. A pool that came from a file and is in none now is removed, if the files have
            at least one pool: the controller does that (`core.removal`).
        now: The time.

    Returns:
        The pools whose removal began here.
    """
    removed: tuple[Key, ...] = ()
    pools = tuple(_following_files(pool, follows=only_source) for pool in wanted.pools)
    if not pools and not (await store.list(Pool)).keys:
        pools = (Pool(metadata=Metadata(name=DEFAULT_POOL)),)
    for pool in pools:
        await _write(store, pool, pool.but(status=PoolStatus()))
    if only_source and wanted.pools:
        removed = await _remove_other_pools(store, {pool.key for pool in wanted.pools}, now)
    for config in wanted.configs:
        await _write(store, config, config.but(status=OIDCConfigStatus()))
    if only_source:
        in_files = {config.key for config in wanted.configs}
        for key in (await store.list(OIDCConfig)).keys:
            if key not in in_files:
                with suppress(NotFound):
                    await store.delete(OIDCConfig, *key)
    return removed


async def withdraw_old_registrations(store: Store, gateway: str) -> None:
    """Removes the registrations that an earlier run of this gateway left on workers.

    The caller holds the home's lock, so that earlier run has ended.
    """
    for worker in (await store.list(Worker)).items:
        others = tuple(entry for entry in worker.status.gateways if entry.gateway != gateway)
        if others != worker.status.gateways:
            with suppress(Conflict, NotFound):  # the registration then expires within a minute
                await store.replace_status(worker.with_status(gateways=others))


def _following_files(pool: Pool, *, follows: bool) -> Pool:
    """The pool of a file, with the mark that it came from there and without a mark that it is being removed."""
    given = {name: value for name, value in pool.metadata.annotations.items() if name not in OWN_ANNOTATIONS}
    marks = {ANNOTATION_SOURCE: FROM_FILE} if follows else {}
    return pool.but(metadata=pool.metadata.but(annotations={**given, **marks}))


async def _remove_other_pools(store: Store, named: set[Key], now: datetime) -> tuple[Key, ...]:
    """Marks the pools that came from a file and are not named. Those that did not come from one stay as they are."""
    marked = []
    for pool in (await store.list(Pool)).items:
        if is_from_file(pool) and pool.key not in named and removal_of(pool) is None:
            log.warning("pool.removing", pool=str(pool.key), reason="no file names it")
            await store.replace(being_removed(pool, now))
            marked.append(pool.key)
    return tuple(marked)


async def _write(store: Store, wanted: P, new: P) -> None:
    while not await _try_write(store, wanted, new):
        pass  # another writer was faster: read the object again


async def _try_write(store: Store, wanted: P, new: P) -> bool:
    """Tries once to create or update an object; returns False if another writer was faster."""
    try:
        try:
            current = await store.get(type(wanted), *wanted.key)
        except NotFound:
            await store.create(new.but(metadata=Metadata(**_user_metadata(wanted))))
            return True
        except UnreadableObject as error:  # the file says what it should be
            found, metadata = error.found, Metadata(**_user_metadata(wanted))
            current = new.but(metadata=metadata.but(uid=found.uid, resource_version=found.version))
        metadata = current.metadata.but(labels=wanted.metadata.labels, annotations=wanted.metadata.annotations)
        await store.replace(current.but(metadata=metadata, spec=wanted.spec))
    except (Conflict, NotFound):
        return False
    return True


def _user_metadata(obj: Resource) -> dict[str, Any]:
    """The part of an object's metadata that the user may set."""
    return obj.metadata.model_dump(include={"name", "namespace", "labels", "annotations"})
