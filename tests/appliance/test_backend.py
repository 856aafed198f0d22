"""The backend of a home is written down with its first `up` (which one it is: tests/cluster/test_choice.py)."""

import pytest

from bkpool.appliance.entry import _backend, _check_address
from bkpool.appliance.settings import Settings
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.settings import Address, Configuration
from bkpool.settings.model import Api


def test_the_first_up_decides_and_later_ones_are_not_moved_silently(tmp_path):
    assert _backend(Settings(home=tmp_path, cache=tmp_path, backend="process"))[0] == "process"
    assert _backend(Settings(home=tmp_path, cache=tmp_path))[0] == "process"
    with pytest.raises(HostFault, match="process"):
        _backend(Settings(home=tmp_path, cache=tmp_path, backend="kind"))


def given(**api):
    return Configuration(api=Api(address=Address("0.0.0.0", 8082), **api))


def test_an_api_in_clear_beyond_this_machine_must_be_asked_for(tmp_path):
    beyond = Settings(home=tmp_path, cache=tmp_path, configuration=given())
    with pytest.raises(InvalidInput, match="served in clear"):
        _check_address(beyond)
    _check_address(Settings(home=tmp_path, cache=tmp_path, configuration=given(plain_http=True)))
    _check_address(Settings(home=tmp_path, cache=tmp_path))
