"""The index of a pool's workers gives what a look at all of them gives, after every change and at every time."""

from collections import Counter, deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from bkpool.core.caller_share import most_leases
from bkpool.core.live_leases import with_live_lease
from bkpool.core.names import LABEL_REQUEST, Slot
from bkpool.core.placement import choose
from bkpool.core.pool_index import PoolIndex
from bkpool.core.queueing import Assignment, assign, slot_of_target
from bkpool.core.reconcile.pool_counts import WorkerCounts
from bkpool.core.worker import EndReason, Phase
from support.examples import examples
from support.objects import NOW, indexed, lease, pool, slot, worker

MOST = 6

# --- the same by a look at all workers ------------------------------------------------------------------------------


def scanned_choice(p, workers, caches, owner, taken, only_ready):
    limit = p.spec.scaling.max
    free = [
        w
        for w in workers
        if w.lease is None and not w.metadata.deletion_timestamp and w.slot.number < limit and w.slot not in taken
    ]
    never = datetime.min.replace(tzinfo=UTC)
    idle = [w for w in free if w.phase is Phase.IDLE and w.status.silent_since is None]
    idle.sort(key=lambda w: w.last_activity_at or never)
    own = [w for w in idle if w.status.cache_owner == owner]
    unused = [w for w in idle if w.status.cache_owner is None]
    starting = [w for w in free if w.phase is Phase.PENDING]
    if own:
        return own[-1]
    if only_ready:
        return next(iter(unused), None)
    if unused or starting:
        return (unused or starting)[0]
    filled = {w.slot for w in workers}
    empty = [one for one in map(slot, range(limit)) if one not in filled and one not in taken]
    if empty:
        return min(empty, key=lambda one: 0 if caches.get(one) == owner else 1 if caches.get(one) is None else 2)
    return next(iter(idle + [w for w in free if w.phase is Phase.FAILED]), None)


def scanned_assignment(waiters, p, workers, caches, turns, claiming, unreadable, now):
    live = with_live_lease(workers, now)
    leased = {key: w for w in live if (key := w.metadata.labels.get(LABEL_REQUEST))}
    repeated = [Assignment(w, leased[w.request_key]) for w in waiters if w.request_key in leased]
    queues = {tenant: deque() for tenant in turns}
    for waiter in waiters:
        if waiter.request_key not in leased:
            queues.setdefault(waiter.tenant, deque()).append(waiter)
    holding = Counter({**claiming, **{w.slot: w.held_lease.holder for w in live}}.values())
    served, taken, ring = [], {*claiming, *unreadable}, deque(queues.values())
    while ring:
        queue = ring.popleft()
        most = {waiter: most_leases(p.spec, admin=waiter.admin) for waiter in queue}
        asked = {one.waiter.request_key for one in served} - {None}
        may = [w for w in queue if w.request_key not in asked and (most[w] is None or holding[w.holder] < most[w])]
        first = next(iter(may), None)
        if first is None:
            continue
        target = scanned_choice(p, workers, caches, first.owner, taken, first.only_ready)
        if target is None and not first.only_ready:
            break
        queue.remove(first)
        ring.append(queue)
        if target is not None:
            served.append(Assignment(first, target))
            taken.add(slot_of_target(target))
            holding[first.holder] += 1
    return repeated + served


# --- random pools ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    number: int
    owner: str
    tenant: str
    holder: str
    admin: bool
    only_ready: bool
    request_key: str | None


NUMBERS = st.integers(0, MOST - 1)
SLOTS = NUMBERS.map(slot)
OWNERS, HOLDERS, KEYS = (st.sampled_from([f"{what}-{n}" for n in range(3)]) for what in ("owner", "holder", "key"))
TIMES = st.integers(-3, 3).map(lambda minutes: NOW + timedelta(minutes=minutes))


@st.composite
def workers(draw, number):
    one = worker(
        number,
        phase=draw(st.sampled_from(list(Phase))),
        cache_owner=draw(st.none() | OWNERS),
        last_activity_at=draw(st.none() | TIMES),
        silent_since=draw(st.sampled_from([None, None, NOW])),
    )
    one = one.but(spec=one.spec.but(last_activity_at=draw(st.none() | TIMES)))
    labels = draw(st.none() | KEYS)
    deleted = draw(st.sampled_from([None, None, None, NOW]))
    metadata = one.metadata.but(labels={LABEL_REQUEST: labels} if labels else {}, deletion_timestamp=deleted)
    one = one.but(metadata=metadata)
    if draw(st.booleans()):
        return one
    held = lease(id=f"lease-{number}-{draw(st.integers(0, 3))}", holder=draw(HOLDERS), expires_at=draw(TIMES))
    ended = {"ended_at": NOW, "end_reason": EndReason.RELEASED}
    return one.with_lease(held.but(**draw(st.sampled_from([{}, {}, ended]))))


@st.composite
def changes(draw):
    number = draw(NUMBERS)
    return slot(number), draw(st.none() | workers(number))


QUESTIONS = st.fixed_dictionaries(
    {
        "waiters": st.lists(
            st.builds(Asking, st.integers(), OWNERS, OWNERS, HOLDERS, st.booleans(), st.booleans(), st.none() | KEYS),
            max_size=6,
        ).map(lambda asked: [replace(one, number=place) for place, one in enumerate(asked)]),
        "p": st.integers(1, MOST).map(lambda most: pool(scaling={"max": most})),
        "caches": st.dictionaries(SLOTS | st.just(Slot("default", "other", 0)), st.none() | OWNERS),
        "turns": st.lists(OWNERS, unique=True).map(tuple),
        "claiming": st.dictionaries(SLOTS, HOLDERS, max_size=3),
        "unreadable": st.sets(SLOTS, max_size=1),
        "now": TIMES,
    }
)


@settings(max_examples=examples(200))
@given(st.lists(st.tuples(st.lists(changes(), max_size=4), QUESTIONS), min_size=1, max_size=6))
def test_who_is_served_is_what_a_look_at_all_workers_gives(steps):
    index, members = PoolIndex(), {}
    for changed, asked in steps:
        for where, one in changed:
            index.put(where, one)
            members.pop(where, None)
            if one is not None:
                members[where] = one
        given_now = assign(
            asked["waiters"],
            asked["p"],
            index,
            lambda asked=asked: asked["caches"],
            turns=asked["turns"],
            claiming=asked["claiming"],
            unreadable=asked["unreadable"],
            now=asked["now"],
        )
        assert given_now == scanned_assignment(workers=list(members.values()), **asked)
        check_counts(index, list(members.values()), asked["now"])


def check_counts(index, members, now):
    live = with_live_lease(members, now)
    but = {"lease-0-0", "lease-1-1", "lease-2-2", "lease-9-9"}
    counted = [w.held_lease for w in live if w.held_lease.id not in but]
    assert index.leases.count(now) == len(live)
    assert index.leases.count(now, but) == len(counted)
    for holder in ("holder-0", "holder-1", "holder-2", "holder-3"):
        assert index.leases.count_of(holder, now) == sum(w.held_lease.holder == holder for w in live)
        assert index.leases.count_of(holder, now, but) == sum(one.holder == holder for one in counted)
    of_request = {w.metadata.labels.get(LABEL_REQUEST): w for w in live}
    for key in ("key-0", "key-1", "key-2"):
        assert index.leases.of_request(key, now) == of_request.get(key)
    assert [w.slot for w in members if index.leases.is_live(w.slot, now)] == [w.slot for w in live]
    counts = WorkerCounts()
    for one in members:
        counts.add(one)
    assert index.counts == counts
    assert list(index.workers.values()) == members


def test_of_two_leases_of_one_request_the_one_that_changed_last_is_found_while_it_is_live():
    def holding(number, minutes):
        one = worker(number, lease(id=f"lease-{number}", expires_at=NOW + timedelta(minutes=minutes)))
        return one.but(metadata=one.metadata.but(labels={LABEL_REQUEST: "key"}))

    short, long = holding(0, 1), holding(1, 3)
    index = indexed([short, long])
    assert index.leases.of_request("key", NOW) == long
    index.put(short.slot, short)
    assert index.leases.of_request("key", NOW) == short
    assert index.leases.of_request("key", NOW + timedelta(minutes=1)) == long
    assert index.leases.of_request("key", NOW + timedelta(minutes=3)) is None
    assert index.leases.of_request("key", NOW) == short, "the clock was set back"


def test_a_choice_looks_at_few_workers_of_many():
    class Looked(set):
        def __contains__(self, one):
            seen.append(one)
            return super().__contains__(one)

    idle = [worker(n, cache_owner="owner", last_activity_at=NOW + timedelta(seconds=n)) for n in range(500)]
    busy = [worker(n, lease(id=f"lease-{n}"), phase=Phase.ALLOCATED) for n in range(500, 1000)]
    index, p = indexed([*idle, *busy]), pool(scaling={"max": 1000})
    for owner, chosen in (("owner", idle[-1]), ("another", idle[0])):
        seen: list[Slot] = []
        assert choose(p, index, dict, owner, Looked()) == chosen
        assert seen == [chosen.slot]
