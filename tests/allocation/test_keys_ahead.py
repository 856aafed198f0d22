from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bkpool.allocation import keys_ahead
from bkpool.allocation.keys_ahead import MOST, KeysAhead
from bkpool.pki.authority import Authority, LeafKey

NOW = datetime.now(UTC)


class Timer:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    """Runs what is to be called later when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, object]] = []
        self.timers: list[Timer] = []

    def later(self, seconds, call):
        self.waiting.append((seconds, call))
        self.timers.append(Timer())
        return self.timers[-1]

    def run_next(self) -> float:
        ((seconds, call),) = self.waiting
        self.waiting.clear()
        call()
        return seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def made(monkeypatch) -> list[LeafKey]:
    """The keys that were made."""
    keys: list[LeafKey] = []

    class Counted(LeafKey):
        @classmethod
        def new(cls):
            keys.append(LeafKey.new())
            return keys[-1]

    monkeypatch.setattr(keys_ahead, "LeafKey", Counted)
    return keys


def test_keys_are_made_one_after_the_other_once_nobody_asks(clock, made):
    ahead = KeysAhead(clock.later)
    assert not clock.waiting  # a process that never makes a lease makes no key
    ahead.take()
    assert (len(made), len(ahead)) == (1, 0)
    assert [clock.run_next() for _ in range(MOST)] == [keys_ahead._QUIET] + [0] * (MOST - 1)
    assert (len(made), len(ahead), clock.waiting) == (1 + MOST, MOST, [])


def test_a_key_is_given_away_once_and_no_time_is_spent_on_it(clock, made):
    ahead = KeysAhead(clock.later)
    ahead.take()
    for _ in range(MOST):
        clock.run_next()
    taken = [ahead.take() for _ in range(MOST)]
    assert len(made) == 1 + MOST
    assert len({key.pem for key in taken}) == MOST
    assert ahead.take() is made[-1]  # there were no more
    assert len(made) == 2 + MOST


def test_while_leases_are_made_no_keys_are(clock, made):
    ahead = KeysAhead(clock.later)
    for _ in range(3):
        ahead.take()
        assert clock.waiting[0][0] == keys_ahead._QUIET
        ahead.take()
        clock.run_next()
    assert len(ahead) == 0
    assert len(made) == 6


def test_after_its_end_no_key_is_made_ahead(clock, made):
    ahead = KeysAhead(clock.later)
    ahead.take()
    clock.run_next()
    ahead.close()
    assert len(ahead) == 0
    assert clock.timers[-1].cancelled
    clock.waiting.clear()
    assert ahead.take() is made[-1]
    assert not clock.waiting


async def test_it_ends_with_the_allocator(world, made):
    await world.pool(min=1)
    api = world.replicas[0]
    await api.allocate()
    await api.allocator.close()
    keys = api.allocator._keys
    assert len(keys) == 0
    assert keys.take() is made[-1]
    assert keys._timer is None or keys._timer.cancelled()  # None: on a busy machine it has run before the end


def test_the_certificate_is_for_that_key():
    key, authority = LeafKey.new(), Authority.create(NOW)
    leaf = authority.issue_client("token", NOW, NOW + timedelta(hours=1), make_key=lambda: key)
    certificate = x509.load_pem_x509_certificate(leaf.cert_pem)
    assert load_pem_private_key(leaf.key_pem, None).public_key() == certificate.public_key()
    assert leaf.key_pem == key.pem
    digest = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())
    assert certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value == digest
    assert key.pem.decode() not in repr(key)
