"""revoke, and release --now: the real program against a server that implements the contract."""

import json

import pytest

REVOKED = {
    "leaseId": "0b2e6c86-6f0a-4a63-a8a5-0a6f3f6f0001",
    "workerName": "default-worker-0",
    "namespace": "team",
    "poolName": "default",
    "jobId": "j[1]",
    "requestedBy": "bob",
    "tenant": "acme/app",
}


@pytest.fixture
def revoked(api):
    api.answers["revoke"] = (200, {"revoked": [REVOKED], "failed": []})
    return api


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (("--lease", "an-id"), {"leaseId": "an-id"}),
        (("--worker", "w"), {"workerName": "w", "namespace": "default"}),
        (("--worker", "w", "-n", "team"), {"workerName": "w", "namespace": "team"}),
        (("-p", "big"), {"poolName": "big", "namespace": "default"}),
        (("--identity", "bob"), {"identity": "bob"}),
        (("--identity", "bob", "-n", "team"), {"identity": "bob", "namespace": "team"}),
        (("--tenant", "acme/app"), {"tenant": "acme/app"}),
    ],
)
def test_each_option_names_leases_and_only_workers_and_pools_have_a_default_namespace(
    called, revoked, appliance, arguments, body
):
    code, answer, _ = called("revoke", *arguments)
    assert code == 0
    assert json.loads(answer) == {"revoked": [REVOKED], "failed": []}
    assert revoked.next("revoke").body == body


def test_a_namespace_from_the_environment_does_not_hide_leases_of_others(called, revoked, appliance, monkeypatch):
    monkeypatch.setenv("BKCTL_NAMESPACE", "team")
    called("revoke", "--identity", "bob")
    assert revoked.next("revoke").body == {"identity": "bob"}
    called("revoke", "--worker", "w")
    assert revoked.next("revoke").body == {"workerName": "w", "namespace": "team"}


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        ((), "no option names a lease"),
        (("--identity", "bob", "--pool", "p"), "--identity and --pool: "),
        (("--worker", "w", "--tenant", "t"), "--worker and --tenant: "),
    ],
)
def test_the_leases_must_be_named_in_exactly_one_way(called, revoked, appliance, arguments, begins):
    code, _, told = called("revoke", *arguments)
    assert code == 2
    assert told.startswith(f"error: {begins}")
    assert revoked.calls.empty()


def test_a_terminal_shows_what_was_ended(on_terminal, revoked, appliance):
    code, shown = on_terminal("revoke", "--identity", "bob")
    assert code == 0
    assert "team/default-worker-0  j[1]  bob     acme/app  revoked" in shown
    revoked.answers["revoke"] = (200, {"revoked": [], "failed": []})
    code, shown = on_terminal("revoke", "--identity", "bob")
    assert code == 0
    assert "identity bob has no lease here, so nothing was ended" in shown


def test_a_lease_that_could_not_be_ended_is_shown_and_is_the_exit_code(bkpool_here, on_terminal, revoked, appliance):
    failed = {**REVOKED, "workerName": "default-worker-1", "reason": "the store does not answer"}
    revoked.answers["revoke"] = (200, {"revoked": [REVOKED], "failed": [failed]})
    done = bkpool_here("revoke", "--pool", "default")
    assert done.returncode == 69
    assert json.loads(done.stdout)["failed"] == [failed]
    code, shown = on_terminal("revoke", "--pool", "default")
    assert code == 69
    assert "not revoked" in shown


@pytest.mark.parametrize(
    ("arguments", "field", "option"),
    [(("--worker", "w"), "workerName", "--worker"), (("--lease", "x"), "leaseId", "--lease")],
)
def test_a_refusal_names_the_option(bkpool_here, api, appliance, arguments, field, option):
    fault = {"code": "NoSuchLease", "message": "there is no lease on worker 'w'", "hint": "Look.", "field": field}
    api.answers["revoke"] = (404, {"error": fault})
    done = bkpool_here("revoke", *arguments)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == f"error: {option}: there is no lease on worker 'w'\nhint: Look.\n"


def test_release_now_sends_it(called, api, appliance):
    assert called("release", "--now", "--worker", "w")[0] == 0
    assert api.next("release").body == {"workerName": "w", "namespace": "default", "now": True}
