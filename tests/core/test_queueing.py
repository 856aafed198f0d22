"""Who is served next: tables of the rules, and properties that hold for every queue and pool."""

import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.allocation.wait_queue import Waiter, WaitQueue
from bkpool.core.names import LABEL_REQUEST
from bkpool.core.placement import choose
from bkpool.core.queueing import Assignment, assign, slot_of_target
from bkpool.core.worker import Phase
from support.objects import NOW, indexed, lease, pool, slot, worker


@dataclass(frozen=True)
class Request:
    name: str
    owner: str = "owner-a"
    request_key: str | None = None
    tenant: str = "tenant"
    holder: str = "caller"
    admin: bool = True
    only_ready: bool = False


def leased(number, key=None, **changes):
    held = worker(number, lease(id=f"lease-{number}", **changes), phase=Phase.ALLOCATED)
    labels = {LABEL_REQUEST: key} if key else {}
    return held.but(metadata=held.metadata.but(labels=labels))


def served(waiters, p, workers, caches=None, claiming=(), turns=()):
    """Name of the request and name of the worker it gets, for each request that is served."""
    claiming = dict.fromkeys(claiming, "somebody else")
    given = assign(waiters, p, indexed(workers), lambda: caches or {}, claiming=claiming, turns=turns, now=NOW)
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
TENANTS = st.sampled_from(["tenant-a", "tenant-b", "tenant-c"])
NUMBERS = st.integers(0, 5)


def keys_of(tenant):
    """The keys of a tenant's requests. No other tenant has one of them: a key has the digest of its caller."""
    return st.none() | st.sampled_from([f"key-{number} of {tenant}" for number in (1, 2, 3)])


def requests_of(tenant):
    return st.builds(
        Request, name=st.uuids().map(str), owner=OWNERS, request_key=keys_of(tenant), tenant=st.just(tenant)
    )


@st.composite
def workers_of_a_pool(draw):
    workers = []
    for number in draw(st.sets(NUMBERS)):
        if draw(st.booleans()):
            key = draw(TENANTS.flatmap(keys_of))
            workers.append(leased(number, key, **draw(st.sampled_from([{}, OVER]))))
        else:
            phase = draw(st.sampled_from(list(Phase)))
            workers.append(worker(number, phase=phase, cache_owner=draw(st.none() | OWNERS)))
    return workers


QUEUES = st.lists(TENANTS.flatmap(requests_of), max_size=8)
CACHES = st.dictionaries(NUMBERS.map(slot), st.none() | OWNERS)
CLAIMING = st.sets(NUMBERS.map(slot))
POOLS = st.integers(1, 6).map(lambda n: pool(scaling={"max": n}))


def first_of_each_job(waiters):
    """The requests without the repetitions of those before them."""
    jobs = [waiter.request_key or object() for waiter in waiters]
    return [waiter for place, waiter in enumerate(waiters) if jobs[place] not in jobs[:place]]


@given(QUEUES, POOLS, workers_of_a_pool(), CACHES, CLAIMING)
def test_no_worker_is_assigned_twice_and_requests_keep_their_order(waiters, p, workers, caches, claiming):
    result = assign(waiters, p, indexed(workers), lambda: caches, claiming=dict.fromkeys(claiming, "caller"), now=NOW)
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
    for tenant in {waiter.tenant for waiter in waiters}:
        got = [one.waiter for one in new if one.waiter.tenant == tenant]
        asked = [waiter for waiter in first_of_each_job(queue) if waiter.tenant == tenant]
        assert got == asked[: len(got)], "within a tenant: first come, first served"
    jobs = [one.waiter.request_key for one in new if one.waiter.request_key is not None]
    assert len(set(jobs)) == len(jobs), "one job claims one worker at a time"
    assert len(repeated) == len(waiters) - len(queue), "repeated requests never wait"


@given(QUEUES, POOLS, workers_of_a_pool(), CACHES, CLAIMING)
def test_each_request_gets_the_best_of_what_is_left_and_none_waits_without_need(
    waiters, p, workers, caches, claiming
):
    result = assign(waiters, p, indexed(workers), lambda: caches, claiming=dict.fromkeys(claiming, "caller"), now=NOW)
    new = [one for one in result if slot_of_target(one.target) not in {w.slot for w in workers if w.lease}]
    taken = set(claiming)
    for one in new:
        assert one.target == choose(p, indexed(workers), lambda: caches, one.waiter.owner, taken)
        taken.add(slot_of_target(one.target))
    jobs = {one.waiter.request_key for one in result} - {None}
    for waiter in waiters:
        if waiter not in [one.waiter for one in result] and waiter.request_key not in jobs:
            assert choose(p, indexed(workers), lambda: caches, waiter.owner, taken) is None


@given(QUEUES, POOLS, workers_of_a_pool(), CACHES, CLAIMING)
def test_asking_again_with_the_rest_of_the_queue_gives_nothing_more(waiters, p, workers, caches, claiming):
    claims = dict.fromkeys(claiming, "caller")
    result: list[Assignment[Request]] = assign(waiters, p, indexed(workers), lambda: caches, claiming=claims, now=NOW)
    rest = [waiter for waiter in waiters if waiter not in [one.waiter for one in result]]
    claims |= {slot_of_target(one.target): one.waiter.holder for one in result}
    jobs = {one.waiter.request_key for one in result}
    again = assign(rest, p, indexed(workers), lambda: caches, claiming=claims, claiming_requests=jobs, now=NOW)
    assert again == []


# --- tenants in turn, and the share of one caller -------------------------------------------------------------------


def of(tenant: str, *names: str, **more) -> list[Request]:
    return [Request(name, tenant=tenant, holder=tenant, **more) for name in names]


def test_tenants_are_served_in_turn_whatever_the_order_of_arrival():
    waiters = [*of("a", "A1", "A2", "A3", "A4"), *of("b", "B1"), *of("c", "C1", "C2")]
    order = ["A1", "B1", "C1", "A2", "C2", "A3", "A4"]
    for workers in range(1, 8):
        assert [name for name, _ in served(waiters, pool(scaling={"max": workers}), [])] == order[:workers]


def test_the_turns_of_before_go_on():
    waiters = [*of("a", "A1", "A2"), *of("b", "B1"), *of("c", "C1")]
    given_now = served(waiters, pool(scaling={"max": 4}), [], turns=("c", "gone", "a"))
    assert [name for name, _ in given_now] == ["C1", "A1", "B1", "A2"]


def test_one_worker_is_left_for_others_and_the_admin_may_have_it():
    p, mine = pool(scaling={"max": 3}), [leased(0, holder="a"), leased(1, holder="a")]
    assert served(of("a", "A1", admin=False), p, mine) == []
    assert served([*of("a", "A1", admin=False), *of("b", "B1", admin=False)], p, mine) == [("B1", "2")]
    assert served(of("a", "A1", admin=True), p, mine) == [("A1", "2")]
    assert served(of("a", "A1", "A2", "A3", admin=False), p, []) == [("A1", "0"), ("A2", "1")]
    assert served(of("a", "A1", admin=False), pool(scaling={"max": 1}), []) == [("A1", "0")]


def test_a_claim_that_is_being_written_counts_for_its_caller():
    p, waiters = pool(scaling={"max": 3}), of("a", "A1", "A2", admin=False)
    claims = {slot(0): "a"}
    assert [one.waiter.name for one in assign(waiters, p, indexed([]), dict, claiming=claims, now=NOW)] == ["A1"]
    stored = [leased(0, holder="a")]
    assert [one.waiter.name for one in assign(waiters, p, indexed(stored), dict, claiming=claims, now=NOW)] == ["A1"]


def test_a_job_that_is_claiming_already_waits_and_stops_nobody():
    p, job, again = pool(scaling={"max": 3}), Request("J", request_key="key"), Request("K", request_key="key")
    assert served([job, again, A], p, []) == [("J", "0"), ("A", "1")]
    waiters: list[Request] = [again, A]
    given = assign(
        waiters, p, indexed([]), dict, claiming={slot(0): "caller"}, claiming_requests={"key", None}, now=NOW
    )
    assert [one.waiter.name for one in given] == ["A"]


def test_a_limit_in_the_spec_wins():
    p = pool(scaling={"max": 2}, auth={"limits": {"identity": {"leases": 5}}})
    assert len(served(of("a", "A1", "A2", admin=False), p, [])) == 2


def test_a_caller_at_their_limit_stops_no_other_caller_of_their_tenant():
    first = Request("A1", tenant="team", holder="ann", admin=False)
    second = Request("B1", tenant="team", holder="bob", admin=False)
    assert served([first, second], pool(scaling={"max": 2}), [leased(0, holder="ann")]) == [("B1", "1")]


@given(st.lists(TENANTS, max_size=12), st.integers(1, 6))
def test_no_tenant_gets_two_workers_more_than_another_who_waits(tenants, workers):
    waiters = [Request(str(number), tenant=tenant) for number, tenant in enumerate(tenants)]
    result = assign(waiters, pool(scaling={"max": workers}), indexed([]), dict, now=NOW)
    got = Counter(one.waiter.tenant for one in result)
    left = Counter(tenants) - got
    assert len(result) == min(workers, len(waiters))
    for waiting in left:
        assert all(got[waiting] >= number - 1 for number in got.values())


@given(st.data())
async def test_nobody_waits_for_more_than_one_request_of_each_other_tenant(data):
    """The queue of a pool with one worker, while tenants come and go and one of them asks all the time."""
    p, queue, names = pool(scaling={"max": 1}), WaitQueue(), ["greedy", "a", "b", "c"]
    overtaken: dict[Waiter, Counter[str]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        for tenant in ["greedy", "greedy", *data.draw(st.lists(st.sampled_from(names), max_size=3))]:
            waiter = Waiter("owner", None, tenant, tenant, admin=True)
            if not any(other.tenant == tenant for other in overtaken):
                overtaken[waiter] = Counter()  # the first of its tenant
            queue.join(waiter)
        before = set(queue._waiting)
        queue.serve(p, indexed([]), dict, (), NOW)
        (done,) = before - set(queue._waiting)
        queue.claim_ended(done)
        overtaken.pop(done, None)
        for waiter, counted in overtaken.items():
            if waiter.tenant != done.tenant:
                counted[done.tenant] += 1
                assert counted[done.tenant] == 1, f"{waiter.tenant} was overtaken twice by {done.tenant}"
        following = next((one for one in queue._waiting if one.tenant == done.tenant), None)
        if following is not None:
            overtaken[following] = Counter()


def calls_of(work):
    """What a function returns, and how many functions it calls, in Python and in C."""
    calls = 0

    def count(_frame, event, _arg):
        nonlocal calls
        calls += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        result = work()
    finally:
        sys.setprofile(before)
    return result, calls


def calls_to_assign(requests, workers):
    """How many functions are called to find that no request can be served."""
    waiters = [Request(str(n), tenant=f"tenant-{n % 40}", holder=f"h-{n % 60}", admin=False) for n in range(requests)]
    busy = [leased(number, holder="other") for number in range(workers)]
    full = pool(scaling={"max": workers})
    given, calls = calls_of(lambda: assign(waiters, full, indexed(busy), dict, now=NOW))
    assert given == []
    return calls


@pytest.mark.parametrize("offered", ["idle", "idle of others", "starting", "empty", "empty with caches", "failed"])
def test_many_requests_that_are_served_at_once_cost_little_each(offered):
    """Nobody looks past the workers that others were given: that would cost requests times workers."""
    number = 400
    some = {
        "idle": {"cache_owner": "owner"},
        "idle of others": {"cache_owner": "another"},
        "starting": {"phase": Phase.PENDING},
        "failed": {"phase": Phase.FAILED},
    }.get(offered)
    workers = [worker(n, **some) for n in range(number)] if some else []
    caches = {slot(n): ("another", "owner", None)[n % 3] for n in range(number)} if "caches" in offered else {}
    waiters = [Request(str(n), "owner", tenant="one", holder=f"h-{n % 2}", admin=False) for n in range(number)]
    index, p = indexed(workers), pool(scaling={"max": number}, auth={"limits": {"identity": {"leases": 1000}}})
    given, calls = calls_of(lambda: assign(waiters, p, index, lambda: caches, now=NOW))
    assert len({slot_of_target(one.target) for one in given}) == number
    assert calls <= 60 * number


@pytest.mark.parametrize(("requests", "workers"), [(300, 50), (50, 300), (1000, 1)])
def test_many_requests_and_workers_cost_little_each(requests, workers):
    """A queue is looked at after every change of a worker. So nothing may cost requests times workers."""
    assert calls_to_assign(requests, workers) <= 30 * (requests + workers)


async def test_a_request_leaves_at_the_same_cost_however_many_wait():
    def calls_to_leave(waiting):
        queue = WaitQueue()
        waiters = [Waiter("owner", None, f"tenant-{n}", "caller", admin=True) for n in range(waiting)]
        for waiter in waiters:
            queue.join(waiter)
        _, calls = calls_of(lambda: queue.leave(waiters[-1]))
        assert len(queue) == len(queue._turns) == waiting - 1
        return calls

    assert calls_to_leave(1000) == calls_to_leave(10)


@given(st.lists(st.tuples(TENANTS, st.sampled_from(["join", "join first", "leave"]))))
async def test_the_turns_are_those_of_the_tenants_who_wait(changes):
    queue, waiting = WaitQueue(), []
    for tenant, change in changes:
        if change == "leave":
            leaving = next((one for one in waiting if one.tenant == tenant), None)
            if leaving is not None:
                waiting.remove(leaving)
                queue.leave(leaving)
                queue.leave(leaving)
        else:
            one = Waiter("owner", None, tenant, tenant, admin=True)
            waiting.insert(0 if change == "join first" else len(waiting), one)
            queue.join(one, first=change == "join first")
            assert change == "join" or next(iter(queue._turns)) == tenant
        assert list(queue._waiting) == waiting
        assert set(queue._turns) == {one.tenant for one in waiting}


def test_a_request_that_does_not_wait_stops_nobody_and_takes_no_empty_slot():
    p = pool(scaling={"max": 2})
    now, later = Request("now", only_ready=True), Request("later")
    assert served([now, later], p, []) == [("later", "0")]
    assert served([now, later], p, [worker(1)]) == [("now", "1"), ("later", "0")]
    assert served([now], p, [worker(1, cache_owner="owner-b")]) == []
    assert served([now], p, [worker(1, phase=Phase.PENDING)]) == []


def test_a_change_of_a_pool_in_which_nothing_is_free_costs_next_to_nothing_for_those_who_wait():
    waiters = [Request(str(n), tenant=f"tenant-{n % 40}", holder=f"h-{n}", admin=False) for n in range(1000)]
    index, full = indexed([leased(n, holder="other") for n in range(10)]), pool(scaling={"max": 10})
    given, calls = calls_of(lambda: assign(waiters, full, index, dict, now=NOW))
    assert given == []
    assert calls <= 2 * len(waiters) + 100
