"""The backend CA of each pool: the same each time, and another one for each pool."""

from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.names import Key
from bkpool.pki.authority import Authority
from bkpool.pki.pool_authority import DIALLER_LIFE, PoolAuthorities, WorkerContexts

NOW = datetime.now(UTC).replace(microsecond=0)
P, Q = Key("team", "p"), Key("other", "p")


@pytest.fixture(scope="module")
def master():
    return Authority.create(NOW)


def test_the_ca_of_a_pool_is_the_same_in_every_process(master):
    one, again = (PoolAuthorities(Authority(master.cert_pem, master.key_pem)).current(P) for _ in range(2))
    assert (one.cert_pem, one.key_pem) == (again.cert_pem, again.key_pem)
    assert one.not_after == master.not_after


def test_no_pool_has_the_ca_of_another_or_of_the_appliance(master):
    pools = PoolAuthorities(master)
    made = [pools.current(P), pools.current(Q), pools.current(Key("team", "q")), master]
    assert len({one.mark for one in made}) == len({one.key_pem for one in made}) == 4
    leaf = pools.current(P).issue_dialler("p-gateway.team", NOW, NOW + DIALLER_LIFE)
    assert [one.issued(leaf.cert_pem) for one in made] == [True, False, False, False]
    elsewhere = PoolAuthorities(Authority.create(NOW)).current(P)
    assert elsewhere.key_pem != pools.current(P).key_pem


def test_the_names_of_namespace_and_pool_cannot_be_shifted_into_each_other(master):
    pools = PoolAuthorities(master)
    assert pools.current(Key("a", "b-c")).mark != pools.current(Key("a-b", "c")).mark


def test_workers_of_before_are_known_by_their_mark(master):
    older = Authority.create(NOW)
    pools = PoolAuthorities(master, older)
    current, former = pools.current(P), PoolAuthorities(older).current(P)
    assert [one.mark for one in pools.of_worker(P, current.mark)] == [current.mark]
    assert [one.mark for one in pools.of_worker(P, former.mark)] == [former.mark]
    assert pools.of_worker(P, "") == (master, older), "made before each pool had a CA of its own"
    assert pools.of_worker(P, pools.current(Q).mark) == (), "that of another pool"


def test_a_process_renews_its_certificates_in_time(master):
    clock = [NOW]
    contexts = WorkerContexts(PoolAuthorities(master), "replica-0", lambda: clock[0])
    first = contexts.of(P)
    assert contexts.of(P) == first
    assert contexts.of(P)[0] is not contexts.of(Q)[0]
    clock[0] = NOW + DIALLER_LIFE - timedelta(days=1) + timedelta(minutes=1)
    assert contexts.of(P)[0] is not first[0]
