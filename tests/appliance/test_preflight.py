"""Settings that would expose bearer tokens are refused before anything is opened."""

from pathlib import Path

import pytest

from bkpool.appliance import preflight
from bkpool.appliance.preflight import check_home_complete, check_settings
from bkpool.appliance.run_options import ALL_ROLES, Role, RunOptions
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.settings import Address, Settings
from bkpool.settings.model import ApiSettings
from bkpool.toolchain.host import Check


def everywhere(**api):
    return Settings(api=ApiSettings(address=Address("0.0.0.0", 8082), **api))


def test_an_api_in_clear_beyond_this_machine_needs_plain_http(tmp_path):
    beyond = RunOptions(home=tmp_path, cache=tmp_path, settings=everywhere())
    with pytest.raises(InvalidInput, match="served in clear"):
        check_settings(beyond)
    check_settings(RunOptions(home=tmp_path, cache=tmp_path, settings=everywhere(plain_http=True)))
    check_settings(RunOptions(home=tmp_path, cache=tmp_path))


API, GATEWAY, METRICS, ISSUER = "api.address", "gateway.address", "metrics.address", "dev_issuer.address"


def listening(places=(), roles=ALL_ROLES, **addresses):
    """Options with these addresses; `places` are settings that the user gave by a variable."""
    sections = {name: {"address": address} for name, address in addresses.items() if address}
    sections |= {"dev_issuer": sections.get("dev_issuer", {}) | {"enabled": "dev_issuer" in addresses}}
    settings = Settings.model_validate(
        sections | {"appliance": {"roles": roles}, "api": sections.get("api", {}) | {"plain_http": True}}
    )
    return RunOptions(
        home=Path("/none"),
        cache=Path("/none"),
        settings=settings,
        places={name: f"BKPOOL_{name.upper().replace('.', '_')}" for name in places},
    )


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            listening([API], api=("127.0.0.1", 1235)),
            "BKPOOL_API_ADDRESS: 127.0.0.1:1235 is also the address of the gateway (--gateway-address)",
            "Give the API another port.",
        ),
        (
            listening([GATEWAY], gateway=("0.0.0.0", 8082)),
            "BKPOOL_GATEWAY_ADDRESS: 0.0.0.0:8082 is also the address of the API (--api-address)",
            "Give the gateway another port.",
        ),
        (
            listening([API, METRICS], api=("127.0.0.1", 5000), metrics=("localhost", 5000)),
            "BKPOOL_METRICS_ADDRESS: localhost:5000 is also the address of the API (BKPOOL_API_ADDRESS)",
            "Give the metrics another port.",
        ),
        (
            listening([METRICS, ISSUER], metrics=("::", 5000), dev_issuer=("::1", 5000)),
            "BKPOOL_DEV_ISSUER_ADDRESS: [::1]:5000 is also the address of the metrics (BKPOOL_METRICS_ADDRESS)",
            "Give the development issuer another port.",
        ),
        (
            listening([METRICS], roles={Role.GATEWAY}, metrics=("127.0.0.1", 1235)),
            "BKPOOL_METRICS_ADDRESS: 127.0.0.1:1235 is also the address of the gateway (--gateway-address)",
            "Give the metrics another port.",
        ),
    ],
)
def test_two_servers_at_one_address_are_refused_with_both_places(options, message, hint):
    with pytest.raises(InvalidInput) as caught:
        check_settings(options)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    "options",
    [
        listening(api=("127.0.0.1", 0), gateway=("127.0.0.1", 0), metrics=("127.0.0.1", 0)),
        listening(api=("127.0.0.1", 5000), metrics=("127.0.0.2", 5000)),
        listening(api=("127.0.0.1", 5000), metrics=("::", 5000)),
        listening(roles={Role.API}, api=("127.0.0.1", 1235)),
        listening(api=("127.0.0.1", 8888)),  # the issuer does not run
    ],
)
def test_servers_that_can_run_beside_each_other_are_not_refused(options):
    check_settings(options)


def test_a_home_with_leases_but_without_their_ca_is_refused(tmp_path):
    check_home_complete(tmp_path)
    (tmp_path / "state.db").touch()
    with pytest.raises(HostFault, match="pki is missing") as caught:
        check_home_complete(tmp_path)
    assert caught.value.code == "Unreadable"
    (tmp_path / "pki").mkdir()
    check_home_complete(tmp_path)


def test_up_is_refused_where_no_worker_could_start(tmp_path, monkeypatch):
    found = [Check("privileges", False, "root without CAP_SYS_ADMIN", "Give it."), Check("subuid", False, "none", "")]
    monkeypatch.setattr(preflight, "worker_faults", lambda *_, **__: found)
    with pytest.raises(HostFault) as caught:
        preflight.check_workers_can_start(RunOptions(home=tmp_path, cache=tmp_path))
    assert caught.value.message == (
        "no worker could start on this machine: privileges: root without CAP_SYS_ADMIN "
        "(and 1 more: see `bkpool doctor`)"
    )
    assert caught.value.hint == "Give it."
