from dataclasses import replace
from datetime import timedelta

from bkpool.core.names import ANNOTATION_REMOVING
from bkpool.core.pool import CachesBeyondMax
from bkpool.core.reconcile.actions import FinishLease, RemoveWorker, WipeCache
from bkpool.core.reconcile.decide import decide, state_of
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.removal import CACHES_KEPT, RemovalMark, being_removed, removal_of, what_happens
from bkpool.core.worker import Phase
from support.objects import NOW, lease, pool, pool_status, seen, slot, snapshot, worker

HOUR = timedelta(hours=1)
INPUTS = PoolStatusInputs("tcp://localhost:1235")


def removed(*, at_once=False, since=NOW, **status):
    marked = being_removed(pool(scaling={"min": 2, "max": 4}), since, caches_at_once=at_once)
    return marked.but(status=marked.status.but(**status))


def acts(snap, now=NOW):
    return list(decide(snap, now).actions)


# --- a pool that is removed -----------------------------------------------------------------------------------------


def test_a_removed_pool_gives_up_its_idle_workers_at_once_and_keeps_leased_ones():
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    idle = worker(1)
    observed = {0: seen(0, "owner-a"), 1: seen(1)}
    assert acts(snapshot(removed(), held, idle, observed=observed)) == [RemoveWorker(idle)]
    assert acts(snapshot(removed())) == [], "no worker is made for the floor"
    over = worker(0, lease(ended_at=NOW), phase=Phase.ALLOCATED, cache_owner="owner-a")
    (finish,) = acts(snapshot(removed(), over, observed=observed))
    assert isinstance(finish, FinishLease)


def test_its_caches_go_a_day_after_its_last_lease():
    last = NOW + 3 * HOUR
    snap = snapshot(removed(last_lease_at=last), caches={slot(0): "a", slot(3): "b"})
    plan = decide(snap, NOW)
    assert (plan.actions, plan.wake_at) == ((), last + CACHES_KEPT)
    just_before = last + CACHES_KEPT - timedelta(seconds=1)
    assert acts(snap, just_before) == []
    assert acts(snap, last + CACHES_KEPT) == [WipeCache(slot(0)), WipeCache(slot(3))]


def test_they_stay_a_day_after_the_removal_has_begun_even_if_the_last_lease_was_long_ago():
    for last in (None, NOW - 100 * HOUR):
        snap = snapshot(removed(last_lease_at=last), caches={slot(0): "a"})
        assert decide(snap, NOW).wake_at == NOW + CACHES_KEPT
        assert acts(snap, NOW + CACHES_KEPT) == [WipeCache(slot(0))]


def test_nothing_goes_while_a_lease_is_left_however_long_it_takes():
    held = worker(0, lease(expires_at=NOW + 90 * HOUR, not_after=NOW + 90 * HOUR), phase=Phase.ALLOCATED,
                  cache_owner="owner-a")  # fmt: skip
    snap = snapshot(removed(), held, observed={0: seen(0, "owner-a")}, caches={slot(0): "owner-a", slot(1): "b"})
    assert acts(snap, NOW + 80 * HOUR) == []


def test_a_cache_that_nobody_has_used_and_one_that_is_not_kept_go_at_once():
    assert acts(snapshot(removed(), caches={slot(0): None, slot(1): "a"})) == [WipeCache(slot(0))]
    assert acts(snapshot(removed(at_once=True), caches={slot(1): "a"})) == [WipeCache(slot(1))]


def test_the_status_remembers_the_last_lease_also_without_its_worker_and_over_a_restart():
    p = pool()
    held = worker(0, lease(), phase=Phase.ALLOCATED)
    leased = p.but(status=pool_status(p, [held], INPUTS, NOW))
    assert (leased.status.allocated, leased.status.last_lease_at) == (1, None)
    later = NOW + HOUR
    assert pool_status(leased, [worker(0, last_activity_at=later)], INPUTS, later + HOUR).last_lease_at == later
    without = pool_status(leased, [], INPUTS, later + HOUR)
    assert without.last_lease_at == later + HOUR, "the worker is gone: it ended now at the latest"
    kept = leased.but(status=without)
    assert pool_status(kept, [], INPUTS, later + 5 * HOUR) == without


def test_a_pool_is_gone_when_nothing_is_left_of_it():
    assert state_of(snapshot(removed())).is_gone
    assert not state_of(snapshot(removed(), worker(0))).is_gone
    assert not state_of(snapshot(removed(), caches={slot(0): "a"})).is_gone
    assert not state_of(snapshot(removed(), busy=frozenset({slot(0)}))).is_gone
    assert not state_of(snapshot(removed(), observed={0: seen(0)})).is_gone


def test_the_status_says_what_happens_and_until_when():
    held = worker(0, lease(), phase=Phase.ALLOCATED)
    status = pool_status(removed(), [held], INPUTS, NOW)
    shown = {found.type: (found.status, found.message) for found in status.conditions}["Removing"]
    assert status.phase == "Removing"
    assert shown[0] == "True"
    assert shown[1] == (
        "it is being removed; 1 lease goes on; its caches are deleted 24 h after the last one; "
        "a file of `up -f` that names it keeps it"
    )
    assert "its caches are deleted at 2026-01-02 12:00 UTC" in what_happens(removed(), RemovalMark(NOW), 0, None, NOW)
    at_once = what_happens(removed(at_once=True), RemovalMark(NOW, caches_at_once=True), 1, None, NOW)
    assert at_once == "it is being removed; its builds are cut and its caches are deleted now"
    assert "Removing" not in {found.type for found in pool_status(pool(), [], INPUTS, NOW).conditions}


def test_a_removal_goes_on_and_a_mark_that_cannot_be_read_removes_nothing():
    again = being_removed(removed(), NOW + HOUR, caches_at_once=True)
    assert removal_of(again) == RemovalMark(NOW, caches_at_once=True)
    assert removal_of(being_removed(again, NOW + HOUR)) == RemovalMark(NOW, caches_at_once=True)
    p = pool()
    assert removal_of(p) is None
    odd = p.but(metadata=p.metadata.but(annotations={ANNOTATION_REMOVING: "soon"}))
    assert removal_of(odd) is None


# --- slots beyond the maximum ---------------------------------------------------------------------------------------

CACHES = {slot(0): "a", slot(4): "b", slot(5): "c"}


def shrunk(most, **status):
    p = pool(scaling={"max": most, "scaleDownDelay": "15m"})
    return p.but(status=p.status.but(**status))


def after(p, now, *workers, caches=CACHES):
    """The pool with the status that is written at this time."""
    return p.but(status=pool_status(p, workers, INPUTS, now, caches=caches))


def test_caches_beyond_the_maximum_go_after_the_delay():
    p = after(shrunk(2), NOW)
    assert p.status.caches_beyond_max == (CachesBeyondMax(since=NOW, slots=(4, 5)),)
    snap = snapshot(p, caches=CACHES)
    delay = p.spec.scaling.scale_down_delay
    assert (decide(snap, NOW).actions, decide(snap, NOW).wake_at) == ((), NOW + delay)
    assert acts(snap, NOW + delay) == [WipeCache(slot(4)), WipeCache(slot(5))]
    assert acts(snapshot(p, caches={slot(0): "a"}), NOW + delay) == [], "they are gone"


def test_if_the_maximum_is_raised_meanwhile_nothing_is_lost():
    p = after(shrunk(2), NOW)
    raised = p.but(spec=shrunk(5).spec)
    late = NOW + 5 * HOUR
    assert acts(snapshot(raised, caches=CACHES), late) == [WipeCache(slot(5))], "4 is within it"
    assert acts(snapshot(p.but(spec=shrunk(9).spec), caches=CACHES), late) == []
    again = after(after(p.but(spec=shrunk(9).spec), late), late)
    assert again.status.caches_beyond_max == ()
    lowered = after(again.but(spec=shrunk(2).spec), late)
    assert acts(snapshot(lowered, caches=CACHES), late) == [], "the time begins again"


def test_a_second_cut_has_its_own_time():
    p = after(shrunk(5), NOW)
    p = after(p.but(spec=shrunk(2).spec), NOW + timedelta(minutes=10))
    assert [(group.since - NOW, group.slots) for group in p.status.caches_beyond_max] == [
        (timedelta(0), (5,)),
        (timedelta(minutes=10), (4,)),
    ]
    assert acts(snapshot(p, caches=CACHES), NOW + timedelta(minutes=15)) == [WipeCache(slot(5))]


def test_the_cache_of_a_leased_slot_stays_and_its_time_begins_after_the_lease():
    held = worker(4, lease("b"), phase=Phase.ALLOCATED, cache_owner="b")
    p = after(shrunk(2), NOW, held)
    assert p.status.caches_beyond_max == (CachesBeyondMax(since=NOW, slots=(5,)),)
    stale = shrunk(2, caches_beyond_max=(CachesBeyondMax(since=NOW - HOUR, slots=(4, 5)),))
    snap = snapshot(stale, held, observed={4: replace(seen(4), cache_owner="owner-b")}, caches=CACHES)
    assert WipeCache(slot(4)) not in acts(snap)
    p = after(p, NOW + HOUR)
    assert p.status.caches_beyond_max[-1] == CachesBeyondMax(since=NOW + HOUR, slots=(4,))
