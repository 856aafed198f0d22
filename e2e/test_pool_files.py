"""Pools follow the files of `up -f`: one that is left out drains and comes back, and changes reach workers."""

from __future__ import annotations

import json

from harness import eventually, only_on, pool, really_ran

pytestmark = only_on("process", "elsewhere pools are custom resources")

ONE, TWO = pool("one", scaling={"max": 2}), pool("two", scaling={"max": 2})
GONE, WRONG_INPUT, NOT_FOUND = 7, 2, 5


def phases(appliance) -> dict[str, str]:
    return {found["name"]: found["phase"] for found in appliance.http("GET", "/api/v1/pools")[1]["pools"]}


def test_a_pool_that_is_left_out_keeps_its_leases_and_is_whole_again_when_it_is_named(make_appliance, context):
    appliance = make_appliance()
    appliance.up_from([ONE, TWO])
    held = appliance.allocate("--pool", "two")
    appliance.down("--now").ok()

    appliance.up_from([ONE])
    eventually(lambda: phases(appliance) == {"one": "Ready", "two": "Removing"}, "two is being removed")
    refused = appliance.cli("allocate", "--pool", "two")
    assert refused.code == GONE
    assert "is being removed" in refused.err
    assert "its caches are deleted 24 h after the last one" in appliance.cli("status", "--pool", "two", "--json").out
    built = appliance.build(appliance.builder(held, "held"), context.dockerfile("say held"))
    assert really_ran(built.ok(), "held"), "the lease goes on"
    appliance.down("--now").ok()

    appliance.up()
    assert phases(appliance)["two"] == "Removing", "a bare up changes nothing"
    appliance.down("--now").ok()

    appliance.up_from([ONE, TWO])
    eventually(lambda: phases(appliance) == {"one": "Ready", "two": "Ready"}, "two is back")
    appliance.release(held.lease).ok()
    eventually(lambda: appliance.pool("two")["idle"] == 1, "its worker has started again, and nobody holds it")
    again = appliance.allocate("--pool", "two", name="again")
    assert again.lease["workerName"] == held.lease["workerName"], "the worker with its cache"

    told = appliance.cli("pool", "delete", "two", "--now").ok().json
    assert told["status"] == "removing"
    eventually(lambda: "two" not in phases(appliance), "nothing is left of two")
    assert appliance.cli("pool", "delete", "two").code == NOT_FOUND
    assert not (appliance.home / "slots" / "default" / "two").exists()


def test_a_misspelt_field_ends_up_before_anything_changes(make_appliance):
    appliance = make_appliance()
    appliance.up_from([ONE])
    appliance.down("--now").ok()
    file = appliance.base / "wrong.yaml"
    file.write_text(json.dumps(pool("three", scaling={"mx": 1})))
    refused = appliance.cli("up", "-d", *appliance.addresses, "-f", str(file))
    assert refused.code == WRONG_INPUT
    assert f"{file}, document 1, line 1: spec.scaling.mx: there is no such field; did you mean `max`?" in refused.err
    appliance.up()
    eventually(lambda: phases(appliance) == {"one": "Ready"}, "it has the pool of before, and no other")


def test_after_a_crash_a_changed_collection_reaches_the_idle_worker_and_later_the_leased_one(make_appliance):
    appliance = make_appliance()
    scaling = {"min": 1, "max": 2}
    appliance.up_with({"scaling": scaling})
    held = appliance.allocate()
    eventually(lambda: appliance.pool()["idle"] == 1, "the floor is filled")
    before = {name: config(appliance, name) for name in (0, 1)}
    appliance.kill()

    appliance.up_with({"scaling": scaling, "cache": {"gc": {"keepStorage": "3GB"}}})
    eventually(lambda: "3GB" in config(appliance, 1), "the idle worker is started again")
    assert config(appliance, 0) == before[0], "the leased one keeps what it has"
    appliance.release(held.lease).ok()
    eventually(lambda: "3GB" in config(appliance, 0), "the leased one follows")


def config(appliance, slot: int) -> str:
    """The configuration of the last start in a slot."""
    return (appliance.home / "slots" / "default" / "default" / str(slot) / "buildkitd.toml").read_text()
