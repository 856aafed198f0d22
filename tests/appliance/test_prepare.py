"""The first `up` records the backend of a home. Which one it chooses: test_backend_choice.py."""

import pytest

from bkpool.appliance.prepare import choose_backend
from bkpool.appliance.run_options import RunOptions
from bkpool.core.errors import HostFault


def test_the_first_up_chooses_the_backend_and_later_ones_do_not_change_it(tmp_path):
    assert choose_backend(RunOptions(home=tmp_path, cache=tmp_path, backend="process"))[0] == "process"
    assert choose_backend(RunOptions(home=tmp_path, cache=tmp_path))[0] == "process"
    with pytest.raises(HostFault, match="process"):
        choose_backend(RunOptions(home=tmp_path, cache=tmp_path, backend="kind"))
