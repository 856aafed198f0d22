"""Bad input of every kind through the real programs: one line names the field and the fix, and nothing is lost."""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing

import pytest

from harness import eventually, only_on, pool

pytestmark = only_on("process", "input is checked before the backend is used")

POOL = "apiVersion: buildkit.smrt-devops.net/v1alpha1\nkind: BuildKitPool\nmetadata: {name: default}\nspec: "


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        (["--ttl", "banana"], 2, "ttl"),
        (["--ttl=-1h"], 2, "ttl"),
        (["--ttl", "100000h"], 2, "ttl"),
        (["--ttl", "0s"], 2, "ttl"),
        (["--pool", "nope"], 5, "--pool"),
        (["--pool", ""], 2, "pool"),
        (["--wait", "soon"], 2, "wait"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_the_error_of_a_bad_option_is_one_line_with_its_field(appliance, options, code, field):
    answer = appliance.cli("allocate", *options)
    assert answer.code == code, answer.text
    assert field in answer.err
    assert "Traceback" not in answer.text
    assert answer.out == ""
    assert appliance.pool()["allocated"] == 0


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("{scaling: {max: many}}", "spec.scaling.max"),
        ("{scaling: {min: 3, max: 2}}", "spec.scaling"),
        ("{gateway: {tokenTTL: banana}}", "spec.gateway.tokenTTL"),
        ("[1", "line"),
    ],
)
def test_a_wrong_pool_file_stops_up_before_anything_is_created(make_appliance, spec, field):
    appliance = make_appliance()
    file = appliance.base / "pool.yaml"
    file.write_text(POOL + spec)
    answer = appliance.cli("up", "-d", "--backend", "process", "-f", str(file))
    assert answer.code == 2, answer.text
    assert field in answer.err
    assert "Traceback" not in answer.text
    assert not (appliance.home / "state.db").exists()


def test_the_error_of_a_used_port_names_it_and_the_fix(make_appliance):
    appliance = make_appliance()
    for name, code in (("api", 72), ("gateway", 72)):
        with socket.create_server(("127.0.0.1", appliance.ports[name])):
            addresses = [f"--{n}-address=127.0.0.1:{port}" for n, port in appliance.ports.items()]
            answer = appliance.cli("up", "-d", "--backend", "process", *addresses)
        assert answer.code == code, answer.text
        assert str(appliance.ports[name]) in answer.err
        assert f"--{name}-address" in answer.err
    appliance.up()  # the failed start left nothing that prevents this one


def test_without_an_appliance_every_command_reports_that(make_appliance):
    appliance = make_appliance()
    endpoint = {"BKCTL_ENDPOINT": f"http://127.0.0.1:{appliance.ports['api']}"}
    for command in (["allocate"], ["status"], ["build", "."], ["release", "--token", "x" * 43]):
        answer = appliance.cli(*command, **endpoint)
        assert answer.code == 69, answer.text
        assert "bkpool up" in answer.err


def test_a_home_that_others_can_read_is_refused(make_appliance):
    appliance = make_appliance()
    appliance.home.mkdir(mode=0o755)
    answer = appliance.cli("up", "-d", "--backend", "process")
    assert answer.code == 77, answer.text
    assert "chmod" in answer.err
    appliance.home.chmod(0o700)


def test_an_unreadable_ca_is_an_error_and_never_replaced(make_appliance):
    appliance = make_appliance()
    appliance.up()
    appliance.down().ok()
    key = appliance.home / "pki" / "ca.key"
    before = key.read_bytes()
    key.write_bytes(b"garbage")
    answer = appliance.cli("up", "-d")
    assert answer.code == 78, answer.text
    assert "ca.key" in answer.err
    assert key.read_bytes() == b"garbage"
    key.write_bytes(before)
    key.parent.rename(key.parent.with_name("elsewhere"))
    answer = appliance.cli("up", "-d")
    assert answer.code == 78, "with leases in the store, a missing CA is not created again"
    key.parent.with_name("elsewhere").rename(key.parent)
    appliance.up()


def test_a_row_of_state_db_that_is_not_json_keeps_nothing_from_starting(make_appliance):
    appliance = make_appliance()
    pools = [pool(name, scaling={"min": 0, "max": 2}) for name in ("default", "other")]
    appliance.up_from(pools)
    worker = appliance.allocate().lease["workerName"]
    appliance.down().ok()
    with closing(sqlite3.connect(appliance.home / "state.db")) as db, db:
        db.execute("UPDATE objects SET data = '{half' WHERE name IN (?, 'other')", [worker])

    appliance.up()
    eventually(lambda: appliance.pool()["phase"] == "Degraded", "the pool says so")
    [condition] = [one for one in appliance.pool()["conditions"] if one["type"] == "Unreadable"]
    assert f"{worker} cannot be read: what is stored in state.db is not JSON" in condition["message"]
    other = appliance.cli("status", "--pool", "other")
    assert (other.code, "what is stored in state.db is not JSON" in other.text) == (78, True), other.text
    appliance.allocate(name="beside")

    appliance.cli("pool", "delete", "other", "--now", "--yes").ok()
    eventually(lambda: "other" not in appliance.cli("status").text, "the pool is removed")


def test_no_log_and_no_argv_has_secrets(appliance, context):
    certificates = appliance.allocate()
    appliance.build(appliance.builder(certificates, "secrets"), context.dockerfile("say x")).ok()
    appliance.release(certificates.lease).ok()
    appliance.http("POST", "/api/v1/workers/lookup", {"token": certificates.lease["token"]})
    secrets = [
        certificates.lease["token"],
        (appliance.home / "admin.token").read_text().strip(),
        "PRIVATE KEY",
    ]
    logs = "".join(path.read_text(errors="replace") for path in (appliance.home / "logs").iterdir())
    assert logs
    assert [secret for secret in secrets if secret in logs] == []
