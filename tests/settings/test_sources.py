"""Precedence of the sources, what each refuses, and that a value survives being written and read."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given

from bkpool.core.errors import InvalidInput
from bkpool.core.names import Key
from bkpool.settings import kinds
from bkpool.settings.catalogue import all_settings, find
from bkpool.settings.kinds import Address
from bkpool.settings.sources import ValueSource, from_document, from_environment, from_options, resolve
from support.setting_values import any_value, bounds

HERE = Path("/somewhere")
FILE = Path("/home/config.toml")
REMEMBERED = Path("/home/remembered.toml")
NAME = "appliance.drain_timeout"

GIVES = {
    ValueSource.OPTION: lambda text: from_options({NAME: text}, HERE),
    ValueSource.ENVIRONMENT: lambda text: from_environment({"BKPOOL_APPLIANCE_DRAIN_TIMEOUT": text}, HERE),
    ValueSource.FILE: lambda text: from_document({"appliance": {"drain_timeout": text}}, FILE, ValueSource.FILE),
    ValueSource.REMEMBERED: lambda text: from_document(
        {"appliance": {"drain_timeout": text}}, REMEMBERED, ValueSource.REMEMBERED
    ),
}
ORDER = list(GIVES)


@pytest.mark.parametrize("present", range(2 ** len(ORDER)))
def test_the_first_source_that_has_a_value_wins(present):
    having = [source for number, source in enumerate(ORDER) if present >> number & 1]
    layers = [GIVES[source](f"{60 + ORDER.index(source)}s") if source in having else {} for source in ORDER]
    value = resolve(*layers).get(NAME)
    if having:
        assert value.source is having[0]
        assert value.value == timedelta(seconds=60 + ORDER.index(having[0]))
    else:
        assert (value.source, value.value) == (ValueSource.DEFAULT, timedelta(minutes=10))


def test_each_value_knows_where_it_was_given():
    assert [GIVES[source]("1m")[NAME].where for source in ORDER] == [
        "--drain-timeout",
        "BKPOOL_APPLIANCE_DRAIN_TIMEOUT",
        "/home/config.toml: [appliance] drain_timeout",
        "/home/remembered.toml: [appliance] drain_timeout",
    ]


@pytest.mark.parametrize(
    ("document", "message", "hint"),
    [
        (
            {"gateway": {"handshake_timeout": "soon"}},
            "/home/config.toml: [gateway] handshake_timeout: 'soon' is not a duration",
            "Write a duration from 1s to 2m.",
        ),
        (
            {"gateway": {"handshake_timeout": "1h"}},
            "/home/config.toml: [gateway] handshake_timeout: '1h' is out of bounds",
            "Write a duration from 1s to 2m.",
        ),
        (
            {"gateway": {"handshake_timeout": 15}},
            "/home/config.toml: [gateway] handshake_timeout: '15' is not text in quotes",
            "Write a duration from 1s to 2m.",
        ),
        (
            {"gateway": {"connections": True}},
            "/home/config.toml: [gateway] connections: 'True' is not a whole number",
            "Write a whole number from 1 to 1000000.",
        ),
        (
            {"api": {"tls": "yes"}},
            "/home/config.toml: [api] tls: 'yes' is neither true nor false",
            "Write true or false, such as true.",
        ),
        (
            {"gateway": {"handshake_timout": "15s"}},
            "/home/config.toml: [gateway] handshake_timout: there is no such field",
            "Did you mean handshake_timeout?",
        ),
        (
            {"gatway": {"connections": 5}},
            "/home/config.toml: [gatway]: there is no such section",
            "Did you mean gateway?",
        ),
        (
            {"connections": 5},
            "/home/config.toml: [connections]: there is no such section",
            "`bkpool config` lists all settings.",
        ),
        (
            {"api": 5},
            "/home/config.toml: api: there is no such field outside a section",
            "Write a section: [api].",
        ),
        (
            {"api": [{"tls": True}]},
            "/home/config.toml: api: is a list, and not a section",
            "Write [api].",
        ),
        (
            {"gateway": {"hosts": ["a", ""]}},
            '/home/config.toml: [gateway] hosts: ["a", ""] has an item that is empty',
            "Write a list of texts, such as one,two.",
        ),
        (
            {"home": "/x"},
            "/home/config.toml: home: the home cannot be set in this file",
            "Set the environment variable BKPOOL_HOME.",
        ),
        (
            {"appliance": {"backend": "kind"}},
            "/home/config.toml: [appliance] backend: the backend cannot be set in this file",
            "Give `up` the option --backend, as in `bkpool up --backend kind`.",
        ),
    ],
)
def test_a_fault_in_the_file_names_the_place_the_value_and_what_is_allowed(document, message, hint):
    with pytest.raises(InvalidInput) as caught:
        from_document(document, FILE, ValueSource.FILE)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("BKPOOL_API_ADDRESS", "nowhere", "BKPOOL_API_ADDRESS: 'nowhere' is not of the form HOST:PORT"),
        ("BKPOOL_API_TLS", "maybe", "BKPOOL_API_TLS: 'maybe' is neither true nor false"),
        ("BKPOOL_GATEWAY_CONNECTIONS", "-1", "BKPOOL_GATEWAY_CONNECTIONS: '-1' is not a whole number"),
        ("BKPOOL_GATEWAY_CONECTIONS", "5", "BKPOOL_GATEWAY_CONECTIONS: there is no such setting"),
        ("BKPOOL_GATEWAY_HOSTS", "a,,b", "BKPOOL_GATEWAY_HOSTS: 'a,,b' has an item that is empty"),
        (
            "BKPOOL_GATEWAY_HOSTS",
            '["a"]',
            """BKPOOL_GATEWAY_HOSTS: '["a"]' is in brackets, which only a list in config.toml has""",
        ),
        ("BKPOOL_KUBERNETES_NAMESPACE", "UPPER", "BKPOOL_KUBERNETES_NAMESPACE: 'UPPER' is not a valid name"),
        (
            "BKPOOL_KUBERNETES_POOL_NAMESPACES",
            "team,A B",
            "BKPOOL_KUBERNETES_POOL_NAMESPACES: 'team,A B' has an item that is not a valid name",
        ),
        ("BKPOOL_GATEWAY_POOL", "team/P", "BKPOOL_GATEWAY_POOL: 'team/P' is not a valid name"),
        ("BKPOOL_APPLIANCE_ROLES", "cook", "BKPOOL_APPLIANCE_ROLES: 'cook' is not a list of roles"),
    ],
)
def test_a_fault_in_the_environment_names_the_variable(variable, text, message):
    with pytest.raises(InvalidInput) as caught:
        from_environment({variable: text}, HERE)
    assert caught.value.message == message
    assert caught.value.hint


@pytest.mark.parametrize(
    "variable",
    [
        *("BKPOOL_HOME", "BKPOOL_CACHE", "BKPOOL_MIRROR", "BKPOOL_DEBUG", "BKPOOL_LEASE_TOKEN", "BKPOOL_ID_TOKEN"),
        *("BKPOOL_API_SERVICE_HOST", "BKPOOL_API_SERVICE_PORT", "BKPOOL_API_SERVICE_PORT_HTTP"),
        *("BKPOOL_GATEWAY_PORT", "BKPOOL_GATEWAY_PORT_1235_TCP", "BKPOOL_GATEWAY_PORT_1235_TCP_ADDR"),
        "PATH",
    ],
)
def test_variables_with_another_meaning_are_left_alone(variable):
    assert from_environment({variable: "x"}, HERE) == {}


def test_an_empty_variable_gives_nothing():
    assert from_environment({"BKPOOL_API_ADDRESS": ""}, HERE) == {}


def test_no_setting_has_a_name_that_kubernetes_gives_to_services():
    for one in all_settings().values():
        assert not one.field.startswith(("port", "service_")), one.name


NO_ADDRESSES = [
    "[]:80",
    "[[::1]]:80",
    "[::1]]:80",
    "[::1:80",
    "[x]:80",
    "[127.0.0.1]:80",
    "::1:80",
    ":80",
    "[:80",
    "a b:80",
]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_an_address_without_a_host_or_with_odd_brackets_is_refused_from_every_source(text):
    document = {"metrics": {"address": text}}
    for give, where in (
        (lambda: from_options({"metrics.address": text}, HERE), "--metrics-address"),
        (lambda: from_environment({"BKPOOL_METRICS_ADDRESS": text}, HERE), "BKPOOL_METRICS_ADDRESS"),
        (lambda: from_document(document, FILE, ValueSource.FILE), "/home/config.toml: [metrics] address"),
        (
            lambda: from_document(document, REMEMBERED, ValueSource.REMEMBERED),
            "/home/remembered.toml: [metrics] address",
        ),
    ):
        with pytest.raises(InvalidInput) as caught:
            give()
        assert caught.value.message == f"{where}: {text!r} is not of the form HOST:PORT"


@pytest.mark.parametrize("text", ["[::1]:80", "[fe80::1%eth0]:80", "127.0.0.1:0", "host.example:65535"])
def test_an_address_is_written_as_it_was_read(text):
    assert from_environment({"BKPOOL_API_ADDRESS": text}, HERE)["api.address"].text == text


def test_values_that_contradict_each_other_are_refused():
    layer = from_environment({"BKPOOL_CONTROLLER_BACKOFF": "5m"}, HERE)
    with pytest.raises(InvalidInput, match=r"BKPOOL_CONTROLLER_BACKOFF: controller.backoff \(5m\) is more than"):
        resolve(layer)


@pytest.mark.parametrize("side", ["client", "worker"])
def test_a_peer_is_not_given_up_before_buildkit_gives_it_up(side):
    variable = f"BKPOOL_GATEWAY_{side.upper()}_PEER_TIMEOUT"
    with pytest.raises(InvalidInput) as caught:
        from_environment({variable: "14s"}, HERE)
    assert caught.value.message == (
        f"{variable}: '14s' is too low: BuildKit itself waits 15s for the answer to its health check of a session"
    )
    assert caught.value.hint == "Write a duration from 15s to 1h."
    assert from_environment({variable: "15s"}, HERE)


@pytest.mark.parametrize("text", ["10", "GB", "1.5%", "10 %%", "10i", "-1GB", "10EB", "ten GB", " 1GB"])
def test_what_buildkitd_does_not_take_as_a_size_is_refused(text):
    with pytest.raises(InvalidInput) as caught:
        from_environment({"BKPOOL_WORKERS_GC_KEEP_STORAGE": text}, HERE)
    assert caught.value.message == f"BKPOOL_WORKERS_GC_KEEP_STORAGE: {text!r} is not a size with a unit"
    assert caught.value.hint == "Write a size from 1MB to 1PB, or a share of the disk from 1% to 100%."


@pytest.mark.parametrize("text", ["0%", "101%", "0B", "1023kB", "1025TB", "2PB"])
def test_a_size_has_bounds(text):
    with pytest.raises(InvalidInput, match=f"GC_KEEP_STORAGE: '{text}' is out of bounds"):
        from_environment({"BKPOOL_WORKERS_GC_KEEP_STORAGE": text}, HERE)


def test_the_blank_of_a_size_is_removed_because_buildkitd_takes_none_before_a_percent_sign():
    layer = from_environment({"BKPOOL_WORKERS_GC_KEEP_STORAGE": "10 %"}, HERE)
    assert layer["workers.gc_keep_storage"].value == "10%"


@pytest.mark.parametrize(("reserved", "fits"), [("10GB", True), ("10241MB", False), ("90%", True)])
def test_the_reserve_of_a_cache_does_not_exceed_its_size(reserved, fits):
    layer = from_environment({"BKPOOL_WORKERS_GC_RESERVED_SPACE": reserved}, HERE)
    if fits:
        resolve(layer)
        return
    with pytest.raises(InvalidInput, match=r"RESERVED_SPACE: workers.gc_reserved_space \(10241MB\) is more than"):
        resolve(layer)


def test_relative_paths_start_where_they_were_written():
    assert from_options({"api.cert": "a.crt"}, HERE)["api.cert"].value == HERE / "a.crt"
    in_file = from_document({"api": {"cert": "a.crt"}}, FILE, ValueSource.FILE)
    assert in_file["api.cert"].value == FILE.parent / "a.crt"


@pytest.mark.parametrize("name", ["api.address", "BKPOOL_API_ADDRESS", "--api-address"])
def test_a_setting_is_found_by_each_of_its_names(name):
    assert find(name).name == "api.address"


@given(any_value())
def test_every_value_survives_being_written_and_read(case):
    one, value = case
    assert one.from_toml(one.kind.write(value), where="here", directory=HERE) == value
    listed = isinstance(value, tuple | frozenset) and not isinstance(value, Address | Key)
    if not listed or (value and not any("," in str(item) for item in value)):
        assert one.from_text(one.text(value), where="here", directory=HERE) == value


def test_every_number_and_duration_has_bounds_and_every_setting_a_description():
    for one in all_settings().values():
        assert one.description.endswith("."), one.name
        if one.kind in {kinds.COUNT, kinds.DURATION}:
            assert re.search(r"\bIf\b|\bhas the effects\b|\braise it\b", one.description), (
                f"{one.name}: what if it is too low?"
            )
            lowest, highest = bounds(one)
            assert lowest <= one.default <= highest, one.name
