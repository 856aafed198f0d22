"""`auth check`: where the token goes, what is shown, and the exit code for each outcome."""

import io
import json

import pytest

ALLOWED = {
    "allowed": True,
    "reason": "rule 1",
    "identity": {"name": "me[1]", "authority": "https://i", "source": "config", "groups": ["a", "b"], "pools": []},
    "verdicts": [
        {"source": "config", "known": True, "reason": ""},
        {"source": "other", "known": False, "reason": "the audience is another"},
    ],
}
DENIED = ALLOWED | {"allowed": False, "reason": "no rule names this caller"}
UNKNOWN = {"allowed": False, "reason": "nobody knows it"}


@pytest.mark.parametrize(("answer", "code"), [(ALLOWED, 0), (DENIED, 4), (UNKNOWN, 3)])
def test_the_exit_code_shows_the_result_of_the_check(called, api, appliance, tmp_path, answer, code):
    (tmp_path / "token").write_text("a.b.c\n")
    api.answers["check"] = (200, answer)
    result = called("auth", "check", "--token-file", tmp_path / "token", "--pool", "p", "-n", "team")
    assert (result[0], json.loads(result[1]), result[2]) == (code, answer, "")
    call = api.next("/api/v1/auth/check")
    assert call.body == {"token": "a.b.c", "poolName": "p", "namespace": "team"}
    assert call.headers["Authorization"] == "Bearer admin-secret"


def test_the_token_is_read_from_stdin_and_a_remote_appliance_gets_no_other_token(called, api, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a.b.c\n"))
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    monkeypatch.setenv("BKCTL_TOKEN", "own")
    assert called("auth", "check", "--token-file", "-", "--pool", "p")[0] == 0
    call = api.next()
    assert call.body["token"] == "a.b.c"
    assert "Authorization" not in call.headers


def test_on_a_terminal_check_shows_a_table(on_terminal, api, appliance, tmp_path):
    (tmp_path / "token").write_text("a.b.c\n")
    api.answers["check"] = (200, ALLOWED)
    code, shown = on_terminal("auth", "check", "--token-file", tmp_path / "token", "--pool", "p")
    assert code == 0
    assert shown.splitlines()[0] == "allowed: rule 1"
    assert "me[1]" in shown
    assert "a, b" in shown
    assert "the audience is another" in shown
    assert "a.b.c" not in shown


ISSUERS = {
    "issuers": [
        {"name": "ok", "namespace": "s", "issuer": "https://i", "audience": "a", "ready": True, "message": "1 key"},
        {"name": "bad", "namespace": "s", "issuer": "https://w", "audience": "a", "ready": False, "message": "[why]"},
    ]
}


def test_issuers_are_a_table_with_their_problems_below(on_terminal, called, api, appliance):
    api.answers["issuers"] = (200, ISSUERS)
    assert json.loads(called("auth", "issuers")[1]) == ISSUERS
    code, shown = on_terminal("auth", "issuers")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert code == 0
    assert lines == ["name ready audience issuer", "s/ok yes a https://i", "s/bad no a https://w", "s/bad: [why]"]


def test_the_hint_about_a_file_that_is_missing_speaks_of_the_file(called, tmp_path):
    code, _, err = called("auth", "check", "--token-file", tmp_path / "none", "--pool", "p")
    assert code == 2
    assert err.endswith("cannot be read: No such file or directory\nhint: Name a file that you can read.\n")
