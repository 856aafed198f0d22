"""Settings that would expose bearer tokens are refused before anything is opened."""

import pytest

from bkpool.appliance.preflight import check_home_complete, check_settings
from bkpool.appliance.run_options import RunOptions
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.settings import Address, Settings
from bkpool.settings.model import ApiSettings


def everywhere(**api):
    return Settings(api=ApiSettings(address=Address("0.0.0.0", 8082), **api))


def test_an_api_in_clear_beyond_this_machine_needs_plain_http(tmp_path):
    beyond = RunOptions(home=tmp_path, cache=tmp_path, settings=everywhere())
    with pytest.raises(InvalidInput, match="served in clear"):
        check_settings(beyond)
    check_settings(RunOptions(home=tmp_path, cache=tmp_path, settings=everywhere(plain_http=True)))
    check_settings(RunOptions(home=tmp_path, cache=tmp_path))


def test_a_home_with_leases_but_without_their_ca_is_refused(tmp_path):
    check_home_complete(tmp_path)
    (tmp_path / "state.db").touch()
    with pytest.raises(HostFault, match="pki is missing") as caught:
        check_home_complete(tmp_path)
    assert caught.value.code == "Unreadable"
    (tmp_path / "pki").mkdir()
    check_home_complete(tmp_path)
