"""Whether workers can have a network is decided once, so one failure does not decide it."""

from __future__ import annotations

import pytest

from bkpool.appliance import worker_network
from bkpool.core.errors import HostFault


class Runtime:
    """Stands for a runtime whose network fails some times: a real one fails only while somebody removes its files."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tries = 0

    async def try_network(self) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise HostFault("can't find '__main__' module")


async def test_a_network_that_fails_once_is_tried_again():
    runtime = Runtime(failures=1)
    await worker_network._try_network(runtime)
    assert runtime.tries == 2
    with pytest.raises(HostFault):
        await worker_network._try_network(Runtime(failures=2))
