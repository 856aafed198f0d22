"""The list of faults depends only on the seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from chaos.schedule import CALM, KINDS, LANES, schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from support.examples import examples

pytestmark = pytest.mark.any_python

SEEDS = st.integers(0, 2**32)
SECONDS = st.floats(1, 1200)
BACKENDS = st.sampled_from(sorted(LANES))


def test_a_seed_gives_the_same_faults_as_in_earlier_versions():
    first = [fault for fault in schedule(6, 60, "process") if fault.lane != "machine"][:3]
    assert [(fault.at, fault.kind, fault.seconds, fault.victim) for fault in first] == [
        (5.5, "stop-worker", 1.59, 300),
        (10.07, "end-appliance", 0.86, 207),
        (11.09, "kill-worker", 0.0, 434),
    ]


@settings(max_examples=examples(30))
@given(SEEDS, SECONDS, BACKENDS)
def test_the_same_seed_gives_the_same_list(seed, seconds, backend):
    assert schedule(seed, seconds, backend) == schedule(seed, seconds, backend)


@settings(max_examples=examples(30))
@given(SEEDS, SECONDS, BACKENDS)
def test_faults_are_in_order_end_within_the_run_and_do_not_overlap_in_a_lane(seed, seconds, backend):
    faults = schedule(seed, seconds, backend)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    for fault in faults:
        kind = KINDS[fault.kind]
        assert fault.lane in LANES[backend]
        assert kind.shortest - 0.01 <= fault.seconds <= kind.longest + 0.01
        assert CALM <= fault.at <= fault.at + fault.seconds <= seconds + 0.02
    for lane in LANES[backend]:
        mine = [fault for fault in faults if fault.lane == lane]
        for before, after in pairwise(mine):
            assert before.at + before.seconds < after.at


@settings(max_examples=examples(30))
@given(SEEDS, SECONDS, SECONDS, BACKENDS)
def test_a_longer_run_begins_with_the_same_faults_in_each_lane(seed, one, other, backend):
    short, long = schedule(seed, min(one, other), backend), schedule(seed, max(one, other), backend)
    for lane in LANES[backend]:
        of_short = [fault for fault in short if fault.lane == lane]
        assert [fault for fault in long if fault.lane == lane][: len(of_short)] == of_short


@pytest.mark.parametrize("backend", sorted(LANES))
@settings(max_examples=examples(30))
@given(seed=SEEDS)
def test_every_kind_of_fault_occurs_regularly(backend, seed):
    wanted = {kind.name for kind in KINDS.values() if kind.lane in LANES[backend]}
    assert {fault.kind for fault in schedule(seed, 100, backend)} == wanted


def test_other_seeds_give_other_lists():
    assert len({tuple(schedule(seed, 60, "kind")) for seed in range(50)}) == 50
