"""An upgrade: the home of an earlier version goes on with today's, and after a downgrade nothing is lost.

The earlier version really runs, from its own files and its own lock (earlier_version.py).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from earlier_version import EarlierVersion, earlier_version

from harness import Appliance, Context, eventually, only_on, pool, really_ran

TOO_LONG = "p" * 58
"""A name that the earlier version accepted for a pool. No worker of it could be made."""


@pytest.fixture(scope="module")
def earlier() -> EarlierVersion:
    return earlier_version()


def as_version(appliance: Appliance, version: EarlierVersion | None) -> None:
    """From now on, the appliance's user runs this version; None: today's."""
    today = Appliance.__dataclass_fields__["program"].default_factory()  # type: ignore[misc]
    appliance.program = version.program if version else today
    appliance.extra_env = version.env if version else {}


def stored(appliance: Appliance, kind: str) -> dict[str, dict[str, Any]]:
    """The stored documents of a kind, by name. The appliance is down."""
    with closing(sqlite3.connect(appliance.home / "state.db")) as db:
        rows = db.execute("SELECT name, data FROM objects WHERE kind = ?", [kind]).fetchall()
    return {name: json.loads(data) for name, data in rows}


def write(appliance: Appliance, doc: dict[str, Any]) -> None:
    """Stores a document, as another version might have done. The appliance is down."""
    with closing(sqlite3.connect(appliance.home / "state.db")) as db, db:
        db.execute("UPDATE objects SET data = ? WHERE uid = ?", [json.dumps(doc), doc["metadata"]["uid"]])


@pytest.mark.parametrize(
    "end", ["killed", pytest.param("down", marks=only_on("process", "on kind it would take a minute more"))]
)
def test_leases_certificates_and_caches_go_on_after_an_upgrade(
    make_appliance: Callable[..., Appliance], context: Context, earlier: EarlierVersion, end: str
) -> None:
    appliance = make_appliance(f"upgrade-{end}")
    as_version(appliance, earlier)
    appliance.up_from([pool("default", scaling={"min": 1, "max": 3}), pool(TOO_LONG)])
    certificates = appliance.allocate()
    idle = appliance.allocate(name="idle")
    builder = appliance.builder(certificates, f"upgrade-{end}")
    appliance.build(builder, context.dockerfile("say kept")).ok()
    (appliance.kill if end == "killed" else appliance.down)()

    as_version(appliance, None)
    appliance.up()
    assert appliance.pool()["allocated"] == 2, "both leases are there"
    [refused] = [one for one in appliance.http("GET", "/api/v1/pools")[1]["pools"] if one["name"] == TOO_LONG]
    assert "has 58 characters, and a pool with scaling.max 10 may have 54" in refused["conditions"][0]["message"]
    assert TOO_LONG in appliance.cli("allocate", "--pool", TOO_LONG).err
    again = appliance.build(builder, context.dockerfile("say kept", "say new")).ok()
    assert not really_ran(again, "kept"), "the cache is there"
    assert really_ran(again, "new")
    renewed = appliance.cli("renew", "--token", certificates.lease["token"], "--ttl", "2h").ok().json
    assert renewed["expiresAt"] > certificates.lease["expiresAt"]
    for lease in (certificates.lease, idle.lease):
        appliance.release(lease).ok()
    eventually(lambda: appliance.pool()["allocated"] == 0, "both leases have ended")
    appliance.all_idle()
    after = appliance.allocate(name="after")
    appliance.build(appliance.builder(after, f"after-{end}"), context.path).ok()
    appliance.release(after.lease).ok()


@only_on("process", "it changes the file; tests/controller and e2e/kind/test_store.py have the rest")
def test_a_leased_worker_in_a_phase_of_a_newer_version_goes_on_after_a_downgrade(
    make_appliance: Callable[..., Appliance], context: Context
) -> None:
    appliance = make_appliance("downgrade")
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "downgrade")
    appliance.build(builder, context.dockerfile("say kept")).ok()
    appliance.kill()
    name = certificates.lease["workerName"]
    doc = stored(appliance, "BuildKitWorker")[name]
    write(appliance, {**doc, "status": {**doc["status"], "phase": "Hibernating"}})
    before = appliance.workers()

    appliance.up()
    eventually(lambda: appliance.pool()["phase"] == "Degraded", "the pool says so")
    [condition] = [one for one in appliance.pool()["conditions"] if one["type"] == "Unreadable"]
    assert f"{name} cannot be read: status.phase: must be 'Pending'" in condition["message"]
    other = appliance.allocate(name="other")
    appliance.build(appliance.builder(other, "other"), context.path).ok()
    refused = appliance.build(builder, context.path)
    assert refused.code != 0
    assert f"{name} cannot be read" in refused.text
    assert appliance.release(certificates.lease).code == 78
    assert set(before) <= set(appliance.workers()), "nothing of it was stopped"
    assert appliance.log.count("store.object_unreadable") == 1
    assert "action.failed" not in appliance.log

    appliance.kill()
    spoilt = stored(appliance, "BuildKitWorker")[name]
    write(appliance, {**spoilt, "status": {**spoilt["status"], "phase": doc["status"]["phase"]}})
    appliance.up()
    again = appliance.build(builder, context.path).ok()
    assert not really_ran(again, "kept")
    for lease in (certificates.lease, other.lease):
        appliance.release(lease).ok()
    eventually(lambda: appliance.pool()["phase"] == "Ready", "all is well again")
