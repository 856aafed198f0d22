from __future__ import annotations

import pytest

from bkpool.core.errors import WorkerFailed
from bkpool.workers.pods.host_ports import HostPorts


def test_ports_are_handed_out_in_turn_and_none_twice():
    ports = HostPorts(range(12400, 12403))
    assert len(ports) == 3
    with ports.reserved(()) as first, ports.reserved(()) as second:
        assert (first, second) == (12400, 12401)
    with ports.reserved(()) as third:
        assert third == 12402
    with ports.reserved({12400}) as again:
        assert again == 12401
    assert not ports.any_free({12400, 12401, 12402})


def test_when_all_are_in_use_it_says_what_to_do():
    with (
        pytest.raises(WorkerFailed, match="all 2 host ports for workers") as full,
        HostPorts((1, 2)).reserved({1, 2}),
    ):
        pytest.fail("there is none")
    assert "spec.scaling.max" in full.value.hint
    with pytest.raises(WorkerFailed, match="none are mapped"), HostPorts(()).reserved(()):
        pytest.fail("there is none")
