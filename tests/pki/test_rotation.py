"""A rotation of the CA: nobody with a lease is cut off, and the former CA is forgotten when nobody needs it."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.gateway.net.tls_context import server_context
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.chain import load_chain
from bkpool.pki.rotation import ROLLOUT, Former, Rotation, may_rotate_again
from support.objects import lease, worker

NOW = datetime.now(UTC)
OLD, NEW = Authority.create(NOW), Authority.create(NOW)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rotation(clock):
    return Rotation(NEW, Former(OLD, NOW), clock)


def holders(*allocated_at):
    return [worker(number, lease(id=str(number), now=at)) for number, at in enumerate(allocated_at)]


def test_a_worker_that_cannot_be_read_may_have_an_earlier_lease(rotation, clock):
    [leased] = holders(NOW)
    found = Unreadable(Worker, leased.key, "status.phase: is unknown", leased.to_json())
    idle = Unreadable(Worker, leased.key, "status.phase: is unknown", leased.with_lease(None).to_json())
    clock.now = NOW + 10 * DAY
    assert rotation.overlaps([found])
    assert not rotation.overlaps([idle])


def connects(rotation, workers, client_authority, trusted):
    """Makes a TLS connection from a client to a gateway, in memory. Returns whether both accept each other."""
    signer = rotation.signer(workers)
    shown = signer.issue_server(["localhost"], [], NOW - DAY, NOW + 10 * DAY)
    server = server_context(shown.cert_pem, shown.key_pem, rotation.trusted_by_gateways(workers))
    client = ssl.create_default_context(cadata=trusted.decode())
    leaf = client_authority.issue_client("T" * 43, NOW, NOW + DAY)
    load_chain(client, leaf.cert_pem, leaf.key_pem)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError:
        return False
    return ends[1].getpeercert(binary_form=True) is not None


def test_without_a_rotation_there_is_one_ca(clock):
    only = Rotation(NEW, None, clock)
    assert (only.signer([]), only.lease_signer, only.next_check) == (NEW, NEW, None)
    assert only.trusted_by_gateways([]) == only.trusted_by_callers([]) == NEW.cert_pem


def test_a_lease_of_before_and_a_new_one_are_both_served_until_the_last_of_before_has_ended(rotation, clock):
    before = holders(NOW - DAY)
    for later in (timedelta(), ROLLOUT + MINUTE, timedelta(hours=20)):
        clock.now = NOW + later
        assert connects(rotation, before, OLD, OLD.cert_pem), "the earlier lease"
        assert connects(rotation, before, rotation.lease_signer, rotation.trusted_by_callers(before)), "a new one"
    between = rotation.trusted_by_callers(before)
    after = holders(NOW + timedelta(hours=2))
    assert connects(rotation, after, NEW, between), "whoever got both CAs goes on"
    assert not connects(rotation, after, OLD, OLD.cert_pem), "the former CA is not trusted any more"
    assert not connects(rotation, after, OLD, NEW.cert_pem)


def test_the_new_ca_signs_leases_only_when_every_gateway_trusts_it(rotation, clock):
    assert rotation.lease_signer is OLD
    assert NEW.cert_pem in rotation.trusted_by_gateways([])
    clock.now = NOW + ROLLOUT
    assert rotation.lease_signer is NEW


def test_what_is_leased_while_replicas_change_counts_as_before(rotation, clock):
    within = holders(NOW + ROLLOUT - MINUTE)
    clock.now = NOW + timedelta(hours=5)
    assert rotation.overlaps(within)
    assert not rotation.overlaps(holders(NOW + ROLLOUT))


def test_callers_get_both_cas_a_little_longer_than_gateways_need_them(rotation, clock):
    clock.now = NOW + timedelta(hours=5)
    assert rotation.overlaps(holders(NOW))
    assert not rotation.overlaps([])
    assert OLD.cert_pem in rotation.trusted_by_callers([])
    clock.now += timedelta(minutes=6)
    assert rotation.trusted_by_callers([]) == NEW.cert_pem
    assert rotation.next_check is None
    assert not rotation.overlaps(holders(NOW)), "what is over does not begin again"


def test_there_is_room_for_one_former_ca_only():
    former = Former(OLD, NOW)
    assert may_rotate_again(None, holders(NOW), NOW)
    assert not may_rotate_again(former, [], NOW + MINUTE)
    assert not may_rotate_again(former, holders(NOW), NOW + DAY)
    assert may_rotate_again(former, holders(NOW + timedelta(hours=3)), NOW + DAY)


def test_the_secret_of_a_cluster_has_both_generations():
    before = ClusterSecrets.create(NOW)
    after = before.rotated(NOW)
    read = ClusterSecrets.of_data(after.to_data())
    assert read.to_data() == after.to_data()
    assert read.token_key == before.token_key
    assert [one.mark for one in read.backends] == [after.backend.mark, before.backend.mark]
    assert read.former.authority.key_pem == before.authority.key_pem
    again = after.rotated(NOW + DAY)
    assert [one.mark for one in again.backends] == [again.backend.mark, after.backend.mark]
