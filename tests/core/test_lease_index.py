"""The index of leases by the digest of their token, compared with a search through all workers."""

from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.lease_index import LeaseIndex
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import EndedLease, EndReason, Worker
from support.objects import NOW, lease, worker


def ended(digest):
    return EndedLease(token_sha256=digest, ended_at=NOW, reason=EndReason.RELEASED)


def unreadable(number, digest):
    document = {"spec": {"allocation": {"tokenSHA256": digest}}}
    return Unreadable(Worker, worker(number).key, "spec: cannot be read", document)


def searched(workers, digest):
    """What a search through all workers finds."""
    workers = sorted(workers, key=lambda one: one.key)
    readable = [one for one in workers if isinstance(one, Worker)]
    for one in readable:
        if one.lease is not None and one.lease.token_sha256 == digest:
            return one
    for one in workers:
        if isinstance(one, Unreadable) and one.of_lease("tokenSHA256") == digest:
            return one
    return next((past for one in readable for past in one.ended_leases if past.token_sha256 == digest), None)


# A token belongs to one worker: its digest begins with the worker's number. If somebody copies a worker, two have it.
LEASES = st.integers(0, 4)
COPIED = 4


def digest_of(number, one):
    return "copied" if one == COPIED else f"{number}/{one}"


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["gone", "unreadable", "free", "leased", "being claimed"]),
        LEASES,
        st.lists(LEASES, max_size=3),
    )
)


def made(number, kind, held, past):
    remembered = tuple(ended(digest_of(number, one)) for one in past)
    if kind == "gone":
        return None
    if kind == "unreadable":
        return unreadable(number, digest_of(number, held))
    if kind == "free":
        return worker(number, ended=remembered)
    return worker(number, lease(token_sha256=digest_of(number, held) if kind == "leased" else ""), ended=remembered)


@given(CHANGES)
def test_it_finds_what_a_search_through_all_workers_finds(changes):
    index, workers = LeaseIndex(), {}
    for number, kind, held, past in changes:
        one = made(number, kind, held, past)
        key = worker(number).key
        index.put(key, one)
        workers.pop(key, None)
        if one is not None:
            workers[key] = one
        for digest in {digest_of(of, one) for of in range(4) for one in range(5)}:
            found = searched(workers.values(), digest)
            assert index.find(digest) == found
            holder = workers.get(index.worker_of(digest))
            assert holder is found or found in holder.ended_leases


@given(CHANGES)
def test_it_keeps_nothing_of_workers_that_are_gone(changes):
    index = LeaseIndex()
    for number, kind, held, past in changes:
        index.put(worker(number).key, made(number, kind, held, past))
    for number in range(4):
        index.put(worker(number).key, None)
    assert (index._having, index._workers) == ({}, {})


def test_a_copy_of_a_worker_that_goes_leaves_the_lease_of_the_worker():
    index, live, copy = LeaseIndex(), worker(0, lease(token_sha256="d")), worker(1, lease(token_sha256="d"))
    index.put(live.key, live)
    index.put(copy.key, copy)
    index.put(copy.key, None)
    assert index.find("d") is live
    assert index.worker_of("d") == live.key


def test_a_lease_without_a_digest_is_not_found():
    index = LeaseIndex()
    index.put(worker(0).key, worker(0, lease(token_sha256="")))
    assert index.find("") is None
