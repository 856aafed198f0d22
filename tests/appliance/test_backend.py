"""A home keeps to the backend it was made with."""

import pytest

from bkpool.appliance.entry import _backend
from bkpool.appliance.settings import Settings
from bkpool.core.errors import HostFault


def test_the_first_up_decides_and_later_ones_are_not_moved_silently(tmp_path):
    assert _backend(Settings(home=tmp_path, cache=tmp_path)) == "process"
    assert _backend(Settings(home=tmp_path, cache=tmp_path, backend="process")) == "process"
    (tmp_path / "backend").write_text("kind\n")
    with pytest.raises(HostFault, match="'kind', not 'process'"):
        _backend(Settings(home=tmp_path, cache=tmp_path, backend="process"))
