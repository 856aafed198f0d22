"""Who is served next: tables of the rules, and properties that hold for every queue and pool."""

from dataclasses import dataclass
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.names import LABEL_REQUEST
from bkpool.core.placement import choose
from bkpool.core.queueing import Assignment, assign, slot_of_target
from bkpool.core.worker import Phase
from support.objects import NOW, lease, pool, slot, worker


@dataclass(frozen=True)
class Request:
    name: str
    owner: str = "owner-a"
    request_key: str | None = None


def leased(number, key=None, **changes):
    held = worker(number, lease(id=f"lease-{number}", **changes), phase=Phase.ALLOCATED)
    labels = {LABEL_REQUEST: key} if key else {}
    return held.but(metadata=held.metadata.but(labels=labels))


def served(waiters, p, workers, caches=None, claiming=()):
    """Name of the request and name of the worker it gets, for each request that is served."""
    given = assign(waiters, p, workers, caches or {}, claiming=claiming, now=NOW)
    return [(one.waiter.name, slot_of_target(one.target).worker.name[-1]) for one in given]


A, B, C = (Request(name) for name in "ABC")
REPEATED = Request("R", request_key="key")
OVER = {"expires_at": NOW - timedelta(seconds=1)}


@pytest.mark.parametrize(
    ("waiters", "maximum", "workers", "claiming", "expected"),
    [
        pytest.param([], 3, [], [], [], id="nobody waits"),
        pytest.param([A, B, C], 2, [], [], [("A", "0"), ("B", "1")], id="in the order of arrival"),
        pytest.param([C, B, A], 2, [], [], [("C", "0"), ("B", "1")], id="the order is that of the queue"),
        pytest.param([A, B], 2, [worker(0)], [], [("A", "0"), ("B", "1")], id="an idle worker before a new slot"),
        pytest.param([A, B], 1, [worker(0)], [], [("A", "0")], id="one worker for one request"),
        pytest.param([A], 1, [leased(0)], [], [], id="the pool is full"),
        pytest.param([A, B], 2, [], [0], [("A", "1")], id="a slot that is being claimed is left alone"),
        pytest.param([A], 2, [worker(0), worker(1)], [0, 1], [], id="all workers are being claimed"),
        pytest.param([A, REPEATED], 1, [leased(0, "key")], [], [("R", "0")], id="a repeated request does not wait"),
        pytest.param([REPEATED], 1, [leased(0, "key")], [0], [("R", "0")], id="also while its worker is claimed"),
        pytest.param([REPEATED, REPEATED], 1, [leased(0, "key")], [], [("R", "0"), ("R", "0")], id="repeated twice"),
        pytest.param([REPEATED], 1, [leased(0, "other")], [], [], id="the lease of another request"),
        pytest.param([REPEATED], 1, [leased(0, "key", **OVER)], [], [], id="an ended lease is no lease"),
        pytest.param([REPEATED], 2, [leased(0)], [], [("R", "1")], id="its first request: served in turn"),
    ],
)
def test_which_requests_are_served(waiters, maximum, workers, claiming, expected):
    p = pool(scaling={"max": maximum})
    assert served(waiters, p, workers, claiming={slot(n) for n in claiming}) == expected


def test_each_request_gets_the_worker_with_its_own_cache():
    mine, theirs = worker(0, cache_owner="owner-a"), worker(1, cache_owner="owner-b")
    p = pool(scaling={"max": 2})
    waiters = [Request("B", "owner-b"), Request("A", "owner-a")]
    assert served(waiters, p, [mine, theirs]) == [("B", "1"), ("A", "0")]


def test_a_request_is_not_overtaken_by_one_that_would_find_a_better_worker():
    """The first request gets the last worker although it wipes the second one's cache: it arrived first."""
    p = pool(scaling={"max": 1})
    waiters = [Request("A", "owner-a"), Request("B", "owner-b")]
    assert served(waiters, p, [worker(0, cache_owner="owner-b")]) == [("A", "0")]


# --- for every queue and every pool -----------------------------------------------------------------------------

OWNERS = st.sampled_from(["owner-a", "owner-b", "owner-c"])
KEYS = st.none() | st.sampled_from(["key-1", "key-2", "key-3"])
NUMBERS = st.integers(0, 5)


@st.composite
def workers_of_a_pool(draw):
    workers = []
    for number in draw(st.sets(NUMBERS)):
        if draw(st.booleans()):
            workers.append(leased(number, draw(KEYS), **draw(st.sampled_from([{}, OVER]))))
        else:
            phase = draw(st.sampled_from(list(Phase)))
            workers.append(worker(number, phase=phase, cache_owner=draw(st.none() | OWNERS)))
    return workers


QUEUES = st.lists(st.builds(Request, name=st.uuids().map(str), owner=OWNERS, request_key=KEYS), max_size=8)
CACHES = st.dictionaries(NUMBERS.map(slot), st.none() | OWNERS)
CLAIMING = st.sets(NUMBERS.map(slot))
POOLS = st.integers(1, 6).map(lambda n: pool(scaling={"max": n}))


@given(QUEUES, POOLS, workers_of_a_pool(), CACHES, CLAIMING)
def test_no_worker_is_assigned_twice_and_requests_keep_their_order(waiters, p, workers, caches, claiming):
    result = assign(waiters, p, workers, caches, claiming=claiming, now=NOW)
    live = {w.metadata.labels.get(LABEL_REQUEST): w for w in workers if w.lease and not w.lease.ended(NOW)}
    repeated = [one for one in result if one.waiter.request_key is not None and one.waiter.request_key in live]
    new = [one for one in result if one not in repeated]

    assert len({one.waiter.name for one in result}) == len(result), "a request is served once"
    for one in repeated:
        assert one.target.metadata.labels[LABEL_REQUEST] == one.waiter.request_key

    slots = [slot_of_target(one.target) for one in new]
    assert len(set(slots)) == len(slots), "no worker or slot is given to two requests"
    assert not claiming & set(slots)
    assert not {w.slot for w in workers if w.lease} & set(slots), "a leased worker is not given away"
    assert all(given_slot.number < p.spec.scaling.max for given_slot in slots)

    queue = [waiter for waiter in waiters if waiter.request_key is None or waiter.request_key not in live]
    assert [one.waiter for one in new] == queue[: len(new)], "first come, first served"
    assert len(repeated) == len(waiters) - len(queue), "repeated requests never wait"


@given(QUEUES, POOLS, workers_of_a_pool(), CACHES, CLAIMING)
def test_each_request_gets_the_best_of_what_is_left_and_none_waits_without_need(
    waiters, p, workers, caches, claiming
):
    result = assign(waiters, p, workers, caches, claiming=claiming, now=NOW)
    new = [one for one in result if slot_of_target(one.target) not in {w.slot for w in workers if w.lease}]
    taken = set(claiming)
    for one in new:
        assert one.target == choose(p, workers, caches, one.waiter.owner, taken)
        taken.add(slot_of_target(one.target))
    left = [waiter for waiter in waiters if waiter not in [one.waiter for one in result]]
    if left:
        assert choose(p, workers, caches, left[0].owner, taken) is None


@given(QUEUES, POOLS, workers_of_a_pool(), CACHES, CLAIMING)
def test_asking_again_with_the_rest_of_the_queue_gives_nothing_more(waiters, p, workers, caches, claiming):
    result: list[Assignment[Request]] = assign(waiters, p, workers, caches, claiming=claiming, now=NOW)
    rest = [waiter for waiter in waiters if waiter not in [one.waiter for one in result]]
    given_away = {slot_of_target(one.target) for one in result}
    assert assign(rest, p, workers, caches, claiming={*claiming, *given_away}, now=NOW) == []
