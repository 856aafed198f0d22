"""pool delete: the real program against a server that implements the contract."""

import json

import pytest

ANSWER = {"status": "removing", "leases": 1, "message": "it is being removed; 1 lease goes on"}


@pytest.fixture
def deleting(api):
    api.answers["delete"] = (200, ANSWER)
    return api


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (("ci",), {"poolName": "ci", "namespace": "default", "now": False}),
        (("ci", "-n", "team", "--now"), {"poolName": "ci", "namespace": "team", "now": True}),
    ],
)
def test_a_script_is_not_asked(called, deleting, appliance, arguments, body):
    code, answer, _ = called("pool", "delete", *arguments)
    assert code == 0
    assert json.loads(answer) == ANSWER
    assert deleting.next("delete").body == body


def test_a_terminal_is_asked_first(on_terminal, deleting, appliance):
    code, shown = on_terminal("pool", "delete", "ci", typed="n\n")
    assert code == 1
    assert "Delete pool default/ci, and, 24 hours after its last lease, its caches? [y/N]" in shown
    assert "nothing was changed" in shown
    assert deleting.calls.empty()
    code, shown = on_terminal("pool", "delete", "ci", "--now", typed="y\n")
    assert code == 0
    assert "cut its builds and delete its caches?" in shown
    assert "pool default/ci: it is being removed; 1 lease goes on" in shown
    code, shown = on_terminal("pool", "delete", "ci", "--yes")
    assert (code, "?" in shown) == (0, False)


def test_a_refusal_says_what_the_user_typed_and_how_to_delete_a_custom_resource(bkpool_here, api, appliance):
    fault = {"code": "NotFound", "message": "there is no pool 'ci'", "hint": "Look.", "field": "poolName"}
    api.answers["delete"] = (404, {"error": fault})
    done = bkpool_here("pool", "delete", "ci")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "error: NAME: there is no pool 'ci'\nhint: Look.\n"
    done = bkpool_here("pool", "delete", "C_I")
    assert done.returncode == 2
    assert done.stderr.startswith("error: NAME: 'C_I' is not a valid name")
