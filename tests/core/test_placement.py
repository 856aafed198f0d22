from datetime import timedelta

from bkpool.core.cache_owner import cache_owner_digest, history_ends_with_lease
from bkpool.core.placement import choose
from bkpool.core.pool import Reuse
from bkpool.core.worker import Phase
from support.objects import NOW, indexed, lease, pool, slot, worker

LONG_AGO = NOW - timedelta(hours=2)


def test_workers_are_chosen_in_the_documented_order():
    p = pool(scaling={"max": 5})
    mine_old = worker(0, cache_owner="me", last_activity_at=LONG_AGO)
    mine = worker(1, cache_owner="me", last_activity_at=NOW)
    unused = worker(2)
    others = worker(3, cache_owner="them", last_activity_at=NOW)
    workers = [others, unused, mine_old, mine]
    chosen = []
    while (target := choose(p, indexed(workers), dict, "me")) in workers:
        chosen.append(target)
        workers.remove(target)
        workers.append(target.with_lease(lease()))
        if len(chosen) == 3:
            break
    assert chosen == [mine, mine_old, unused]
    assert choose(p, indexed(workers), dict, "me") == slot(4), "a new slot before another's cache is wiped"
    full = [*workers, worker(4, lease())]
    assert choose(p, indexed(full), dict, "me") == others
    held = [w.with_lease(lease()) for w in full]
    assert choose(p, indexed(held), dict, "me") is None


def test_of_other_owners_workers_the_least_recently_used_is_chosen():
    p = pool(scaling={"max": 2})
    old, new = (worker(n, cache_owner="them", last_activity_at=at) for n, at in ((0, NOW), (1, LONG_AGO)))
    assert choose(p, indexed([old, new]), dict, "me") == new


def test_a_starting_worker_comes_before_a_new_slot():
    starting = worker(0, phase=Phase.PENDING)
    assert choose(pool(), indexed([starting]), dict, "me") == starting


def test_a_failed_worker_is_chosen_last():
    p = pool(scaling={"max": 2})
    failed = worker(0, phase=Phase.FAILED, failures=2)
    assert choose(p, indexed([failed]), dict, "me") == slot(1)
    assert choose(p, indexed([failed, worker(1, lease())]), dict, "me") == failed


def test_slots_that_others_are_claiming_are_not_chosen():
    idle = worker(0)
    assert choose(pool(scaling={"max": 2}), indexed([idle]), dict, "me", {slot(0)}) == slot(1)
    assert choose(pool(scaling={"max": 1}), indexed([idle]), dict, "me", {slot(0)}) is None


def test_an_empty_slot_with_the_owners_cache_or_a_clean_one_is_preferred():
    p = pool(scaling={"max": 4})
    assert choose(p, indexed([]), lambda: {slot(0): "them", slot(1): None, slot(2): "me"}, "me") == slot(2)
    assert choose(p, indexed([]), lambda: {slot(0): "them", slot(1): None}, "me") == slot(1)
    assert choose(pool(scaling={"max": 1}), indexed([]), lambda: {slot(0): "them"}, "me") == slot(0)


def test_slots_beyond_a_lowered_maximum_are_not_used():
    assert choose(pool(scaling={"max": 1}), indexed([worker(0, lease()), worker(7)]), dict, "me") is None


def test_the_owner_of_a_cache_follows_the_pools_reuse():
    def owner(reuse, tenant, allocation):
        return cache_owner_digest(reuse, tenant, "uid", allocation)

    assert owner(Reuse.IDENTITY, "a", "1") == owner(Reuse.IDENTITY, "a", "2") != owner(Reuse.IDENTITY, "b", "1")
    assert owner(Reuse.POOL, "a", "1") == owner(Reuse.POOL, "b", "2")
    assert owner(Reuse.NEVER, "a", "1") != owner(Reuse.NEVER, "a", "2")


def test_a_cache_of_the_pool_says_whether_its_history_is_kept():
    ends, kept = (cache_owner_digest(Reuse.POOL, "a", "uid", "1", keep_history=keep) for keep in (False, True))
    assert ends != kept, "a kept history is wiped when it may not be read any more"
    assert [history_ends_with_lease(owner, "uid") for owner in (ends, kept, None)] == [True, False, False]
    assert not history_ends_with_lease(ends, "another pool")
    assert not history_ends_with_lease(cache_owner_digest(Reuse.IDENTITY, "a", "uid", "1"), "uid")
