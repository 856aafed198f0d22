"""The order of claims: all replicas agree on it, and what one of them does not know it does not invent."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkpool.core.claim_order import ClaimOrder, Request
from bkpool.core.names import LABEL_REQUEST, Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import EndReason, Worker
from support.examples import examples
from support.objects import NOW, lease, worker

JOB = Request(Key("default", "p"), "job")
OVER = {"ended_at": NOW, "end_reason": EndReason.ABANDONED}


def claimed(number: int, version: int, *, key: str = "job", lease_id: str = "", **changes) -> Worker:
    one = worker(number, lease(id=lease_id or f"lease-{number}", **changes))
    return one.but(metadata=one.metadata.but(resource_version=str(version), labels={LABEL_REQUEST: key}))


def spoiled(one: Worker, version: int) -> Unreadable:
    document = one.to_json()
    document["metadata"]["resourceVersion"] = str(version)
    return Unreadable(Worker, one.key, "spec: broken", document)


def everything(_worker: Worker) -> bool:
    return True


def first(order: ClaimOrder, request: Request = JOB) -> str | None:
    found = order.first(request, everything)
    return found.held_lease.id if found else None


def changed(order: ClaimOrder, *workers: Worker) -> None:
    for one in workers:
        order.event(one.key, one, int(one.metadata.resource_version))


def test_of_two_claims_the_one_whose_change_came_first_is_first():
    order = ClaimOrder()
    order.listed([], 5)
    changed(order, claimed(3, 6), claimed(1, 7))
    assert first(order) == "lease-3"
    changed(order, claimed(3, 8))
    assert first(order) == "lease-3", "a later change of its worker changes nothing"
    changed(order, claimed(3, 9, **OVER))
    assert first(order) == "lease-1"
    order.event(Key("default", "p-worker-1"), None, 10)
    assert first(order) is None


def test_the_order_of_claims_that_one_list_has_shown_is_not_known():
    order = ClaimOrder()
    order.listed([claimed(0, 3), claimed(1, 4)], 5)
    assert first(order) is None
    assert order.first(JOB, lambda one: one.slot.number == 1).slot.number == 1, "of one alone it is"


def test_what_a_list_shows_anew_was_claimed_after_what_was_known_before():
    order = ClaimOrder()
    order.listed([claimed(0, 3)], 5)
    order.listed([claimed(0, 9), claimed(1, 8), claimed(2, 7)], 10)
    assert first(order) == "lease-0", "its worker has changed last, but the claim was known already"
    changed(order, claimed(0, 11, **OVER))
    assert first(order) is None, "the list does not say which of the two was claimed first"


def test_what_a_list_does_not_show_has_ended():
    order = ClaimOrder()
    order.listed([], 5)
    changed(order, claimed(0, 6), claimed(1, 7))
    order.listed([claimed(1, 7)], 9)
    assert first(order) == "lease-1"
    assert not order.knows(JOB, "lease-0")
    assert order.knows(JOB, "lease-1")


def test_a_store_that_begins_again_with_earlier_versions_forgets_the_order():
    order = ClaimOrder()
    order.listed([], 50)
    changed(order, claimed(0, 51), claimed(1, 52))
    order.listed([claimed(0, 7), claimed(1, 8)], 9)
    assert first(order) is None
    assert order.reached == 9


def test_the_next_lease_of_a_worker_is_another_claim():
    order = ClaimOrder()
    order.listed([], 5)
    changed(order, claimed(0, 6), claimed(1, 7), claimed(0, 8, lease_id="next"))
    assert first(order) == "lease-1"


def test_requests_are_told_apart_and_leases_without_a_job_are_not_kept():
    order = ClaimOrder()
    order.listed([], 5)
    assert order.event(Key("default", "p-worker-0"), claimed(0, 6, key="other"), 6) == {JOB._replace(key="other")}
    assert order.event(Key("default", "p-worker-1"), worker(1, lease()), 7) == set()
    assert first(order) is None
    assert first(order, JOB._replace(key="other")) == "lease-0"
    assert order.event(Key("default", "p-worker-0"), claimed(0, 8), 8) == {JOB, JOB._replace(key="other")}
    assert first(order, JOB._replace(key="other")) is None


def test_a_claim_is_not_forgotten_while_its_worker_cannot_be_read():
    order = ClaimOrder()
    order.listed([], 5)
    changed(order, claimed(0, 6))
    order.event(Key("default", "p-worker-0"), spoiled(claimed(0, 6), 7), 7)
    changed(order, claimed(1, 8))
    assert first(order) == "lease-0"
    changed(order, claimed(0, 9))
    assert first(order) == "lease-0"


@pytest.mark.parametrize("by_list", [False, True])
def test_a_claim_that_was_made_while_its_worker_could_not_be_read_has_no_place_in_the_order(by_list):
    order = ClaimOrder()
    hidden = spoiled(claimed(0, 4), 4)
    if by_list:
        order.listed([hidden], 5)
    else:
        order.listed([], 3)
        order.event(hidden.key, hidden, 4)
    changed(order, claimed(1, 6), claimed(0, 7))
    assert first(order) is None, "it may have been claimed before the other one, or after it"


# --- two replicas and one store -------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.integers(0, 3), st.sampled_from(["a", "b"])),
        st.tuples(st.just("end"), st.integers(0, 3), st.just("")),
        st.tuples(st.just("touch"), st.integers(0, 3), st.just("")),
        st.tuples(st.just("follow"), st.integers(0, 1), st.just("")),
        st.tuples(st.just("list"), st.integers(0, 1), st.just("")),
    ),
    max_size=40,
)


@settings(max_examples=examples(200))
@given(STEPS)
def test_whatever_a_replica_has_seen_the_first_claim_that_it_names_is_the_first(steps):
    """Each replica follows the changes at its own pace and lists at any time. Versions are those of the store."""
    log: list[tuple[Key, Worker]] = []
    store: dict[Key, Worker] = {}
    claimed_at: dict[str, int] = {}
    ended_at: dict[str, int] = {}
    replicas, places, ids = [ClaimOrder(), ClaimOrder()], [0, 0], Counter[str]()

    def put(one: Worker) -> None:
        held = store.get(one.key)
        if held is not None and held.lease.ended_at is None and held.lease.id != one.held_lease.id:
            ended_at[held.lease.id] = len(log) + 1
        version = str(len(log) + 1)
        store[one.key] = one.but(metadata=one.metadata.but(resource_version=version))
        log.append((one.key, store[one.key]))

    for what, number, key in steps:
        held = store.get(Key("default", f"p-worker-{number}"))
        if what == "claim" and (held is None or held.lease.ended_at is not None):
            ids["lease"] += 1
            lease_id = f"{ids['lease']}"
            put(claimed(number, 0, key=key, lease_id=lease_id))
            claimed_at[lease_id] = len(log)
        elif what == "end" and held is not None and held.lease.ended_at is None:
            put(held.with_lease(held.lease.but(**OVER)))
            ended_at[held.lease.id] = len(log)
        elif what == "touch" and held is not None:
            put(held)
        elif what == "list":
            replicas[number].listed(store.values(), len(log))
            places[number] = len(log)
        elif what == "follow" and places[number] < len(log):
            name, one = log[places[number]]
            places[number] += 1
            replicas[number].event(name, one, places[number])
        for order, place in zip(replicas, places, strict=True):
            for job in ("a", "b"):
                named = first(order, JOB._replace(key=job))
                live = {
                    one.held_lease.id
                    for _, one in log[:place]
                    if one.metadata.labels[LABEL_REQUEST] == job
                    and ended_at.get(one.held_lease.id, place + 1) > place
                }
                assert all(order.knows(JOB._replace(key=job), lease_id) for lease_id in live)
                if named is not None:
                    assert claimed_at[named] == min(claimed_at[lease_id] for lease_id in live)
                elif live:
                    assert len(live) > 1, "one alone is first"
