"""Work in a thread ends the wait for it, however it ends."""

import sys

import pytest

from bkpool.cli.threads import in_thread


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_the_error_of_the_work_is_raised(fault):
    def fail():
        raise fault

    with pytest.raises(fault):
        in_thread(fail, 60)


def test_an_exit_of_the_work_is_raised():
    with pytest.raises(SystemExit) as ended:
        in_thread(lambda: sys.exit(3), 60)
    assert ended.value.code == 3
