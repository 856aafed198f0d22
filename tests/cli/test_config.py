"""`bkpool config`: what it shows, with the source of each value, and what it changes."""

import json

import pytest


@pytest.fixture
def shown(called):
    """Settings by name, as `bkpool config` with these options shows them."""

    def run(*arguments):
        code, out, err = called("config", *arguments)
        assert (code, err) == (0, "")
        return {one["name"]: one for one in json.loads(out)["settings"]}

    return run


def test_each_value_is_shown_with_its_source(shown, home, monkeypatch):
    (home / "config.toml").write_text('[gateway]\nhandshake_timeout = "15s"\n')
    (home / "remembered.toml").write_text('[kind]\ncluster = "mine"\n')
    monkeypatch.setenv("BKPOOL_METRICS_ADDRESS", "127.0.0.1:1")
    values = shown("--api-address", "127.0.0.1:2", "--gateway-host", "a", "--gateway-host", "b", "--api-tls")

    def of(name):
        return values[name]["value"], values[name]["source"], values[name]["where"]

    assert of("api.address") == ("127.0.0.1:2", "flag", "--api-address")
    assert of("api.tls") == (True, "flag", "--api-tls")
    assert of("gateway.hosts") == (["a", "b"], "flag", "--gateway-host")
    assert of("metrics.address") == ("127.0.0.1:1", "environment", "BKPOOL_METRICS_ADDRESS")
    assert of("gateway.handshake_timeout") == (
        *("15s", "file", f"{home / 'config.toml'}: [gateway] handshake_timeout"),
    )
    assert of("kind.cluster") == ("mine", "remembered", f"{home / 'remembered.toml'}: [kind] cluster")
    assert of("api.cert") == (None, "default", "")


def test_on_a_terminal_it_is_a_table(on_terminal):
    code, text = on_terminal("config", "--api-address", "127.0.0.1:2", BKPOOL_METRICS_ADDRESS="127.0.0.1:1")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "." in line}
    assert code == 0
    assert rows["api.address"] == ["127.0.0.1:2", "flag"]
    assert rows["metrics.address"] == ["127.0.0.1:1", "environment"]
    assert rows["allocation.max_waiters"] == ["1000", "default"]


def test_set_writes_the_file_and_unset_removes_it(called, shown, home):
    code, out, _ = called("config", "set", "gateway.handshake_timeout", "15s")
    assert (code, json.loads(out)["changed"]) == (0, True)
    assert (home / "config.toml").read_text() == '[gateway]\nhandshake_timeout = "15s"\n'
    assert shown()["gateway.handshake_timeout"]["source"] == "file"
    assert json.loads(called("config", "unset", "BKPOOL_GATEWAY_HANDSHAKE_TIMEOUT")[1]) == (
        {"forgotten": False, "removedFromFile": True}
    )
    assert shown()["gateway.handshake_timeout"]["source"] == "default"


def test_set_says_that_the_environment_wins(called, monkeypatch):
    monkeypatch.setenv("BKPOOL_API_TLS", "true")
    assert "BKPOOL_API_TLS is set in this environment and wins" in called("config", "set", "api.tls", "false")[2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("set", "gateway.hanshake_timeout", "15s"), "error: there is no setting 'gateway.hanshake_timeout'\n"),
        (("set", "gateway.handshake_timeout", "3h"), "error: gateway.handshake_timeout: '3h' is out of bounds\n"),
        (("set", "backend", "kind"), "error: there is no setting 'backend'\n"),
        (("set", "controller.backoff", "10m"), "error: controller.backoff: controller.backoff (10m) is more than"),
        (("set", "gateway.hosts", '["a"]'), """error: gateway.hosts: '["a"]' is in brackets, which only a list in"""),
        (("set", "gateway.hosts", "a,,b"), "error: gateway.hosts: 'a,,b' has an item that is empty\n"),
        (("set", "api.cert", "/none.crt"), "error: api.cert: /none.crt cannot be read: No such file or directory\n"),
        (("unset",), "error: NAME: give the name of a setting, or --all\n"),
        (("unset", "--all", "api.tls"), "error: NAME: give the name of a setting, or --all\n"),
        (("--namespace", "UPPER"), "error: --namespace: 'UPPER' is not a valid name\n"),
        (("--pool-namespace", "A B"), """error: --pool-namespace: ["A B"] has an item that is not a valid name\n"""),
        (("--api-address", "x"), "error: --api-address: 'x' is not of the form HOST:PORT\n"),
        (("--api-cert", "/none.crt"), "error: --api-cert: /none.crt cannot be read: No such file or directory\n"),
    ],
)
def test_an_invalid_call_is_one_sentence(called, arguments, error):
    code, out, err = called("config", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(error)
    assert "hint: " in err


def test_set_says_that_the_file_is_still_wrong(called, home):
    (home / "config.toml").write_text('[controller]\nbackoff = "10m"\n[identity]\nkeys_fresh = "2h"\n')
    code, _, err = called("config", "set", "controller.backoff", "1s")
    assert code == 0
    assert err.startswith("warning: the file was wrong before, and still is: ")
    assert "[identity] keys_fresh" in err


def test_unset_forgets_nothing_where_it_is_refused(called, home):
    text = '[controller]\nbackoff = "10m"\nbackoff_max = "20m"\n'
    (home / "config.toml").write_text(text)
    code, _, err = called("config", "unset", "controller.backoff_max")
    assert (code, (home / "config.toml").read_text()) == (2, text)
    assert err.startswith("error: controller.backoff_max: ")


def test_the_backend_is_an_option_of_up(called):
    assert "`bkpool up --backend kind`" in called("config", "set", "backend", "kind")[2]


def test_a_running_appliance_keeps_its_settings(called, appliance):
    assert "keeps its settings until" in called("config", "set", "api.tls", "true")[2]


def test_the_documentation_is_printed(called):
    assert called("config", "--markdown")[1].startswith("# Configuration\n")
