"""The gateway's certificate is renewed when pools change and before it expires, without a restart."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bkpool.appliance.certificate_renewal import CertificateRenewal
from bkpool.core import wall_clock
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.home.files import private_directory
from bkpool.pki.authority import Authority
from bkpool.pki.rotation import Former
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.objects import lease, worker
from support.small_disk import fill, make_room, small_disk


class Gateway:
    """Records the certificates that it gets. The replacement itself is tested in tests/gateway."""

    def __init__(self):
        self.given = []
        self.events = []
        self.changed = asyncio.Event()

    def set_server_certificate(self, cert_pem, key_pem, ca_pem):
        self.given.append(x509.load_pem_x509_certificate(cert_pem))
        self.changed.set()

    def record(self, about, reason, message, *, warning=False):
        self.events.append((about.key.name, reason))

    async def next(self):
        async with asyncio.timeout(60):
            await self.changed.wait()
        self.changed.clear()
        return self.given[-1]


def names(certificate):
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    )


@pytest.fixture
async def store(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    yield store
    await store.close()


@pytest.mark.parametrize(("life", "later"), [(365, timedelta(days=336)), (60, timedelta(days=41))])
async def test_the_certificate_is_renewed_for_a_new_pool_and_before_it_expires(store, tmp_path, life, later):
    """A certificate of a year is renewed 30 days before its end, one of 60 days in the last third."""
    now = datetime.now(UTC)
    private_directory(tmp_path / "pki")
    mirror, gateway = Mirror(store), Gateway()
    renewal = CertificateRenewal(
        directory=tmp_path / "pki",
        authority=Authority.create(now),
        mirror=mirror,
        hosts=("build.example.com",),
        hosts_from="--gateway-host",
        now=lambda: now,
        recorder=gateway,
        life=timedelta(days=life),
    )
    tasks = [asyncio.create_task(mirror.run())]
    await mirror.ready.wait()
    renewal.install(gateway)
    first = await gateway.next()
    assert "build.example.com" in names(first)
    assert timedelta() <= now + timedelta(days=life) - first.not_valid_after_utc < timedelta(seconds=1)
    tasks.append(asyncio.create_task(renewal.run(gateway)))
    await asyncio.sleep(0)

    pool = await store.create(Pool(metadata=Metadata(name="ci")))
    second = await gateway.next()
    assert "ci.default.svc" in names(second)

    now += later
    await store.replace_status(pool.but(status=pool.status.but(phase="Ready")))  # any change of a pool wakes it
    third = await gateway.next()
    assert third.not_valid_after_utc > second.not_valid_after_utc
    assert gateway.events == [("ci", "CertificateRotated")] * 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_after_a_rotation_the_former_ca_signs_until_the_last_lease_of_before_has_ended(store, tmp_path):
    now = datetime.now(UTC)
    old, new = Authority.create(now), Authority.create(now)
    private_directory(tmp_path / "pki")
    mirror, gateway = Mirror(store), Gateway()
    held = await store.create(worker(0, lease(now=now)))
    renewal = CertificateRenewal(
        directory=tmp_path / "pki",
        authority=new,
        former=Former(old, now),
        mirror=mirror,
        hosts=(),
        hosts_from="--gateway-host",
        now=lambda: now,
        recorder=gateway,
    )
    tasks = [asyncio.create_task(mirror.run())]
    await mirror.ready.wait()
    now += timedelta(hours=2)
    renewal.install(gateway)
    assert old.issued((await gateway.next()).public_bytes(Encoding.PEM))
    tasks.append(asyncio.create_task(renewal.run(gateway)))
    await asyncio.sleep(0)
    await store.replace(held.with_lease(None))
    assert new.issued((await gateway.next()).public_bytes(Encoding.PEM))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_certificate_that_came_due_while_the_machine_slept_is_renewed_although_no_pool_changes(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(wall_clock, "LONGEST_SLEEP", 0.01)
    now = datetime.now(UTC)
    private_directory(tmp_path / "pki")
    mirror, gateway = Mirror(store), Gateway()
    renewal = CertificateRenewal(
        directory=tmp_path / "pki",
        authority=Authority.create(now),
        mirror=mirror,
        hosts=(),
        hosts_from="--gateway-host",
        now=lambda: now,
        recorder=gateway,
    )
    renewal.install(gateway)
    first = await gateway.next()
    running = asyncio.create_task(renewal.run(gateway))
    await asyncio.sleep(0)
    now += timedelta(days=360)
    assert (await gateway.next()).not_valid_after_utc > first.not_valid_after_utc
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_certificate_that_finds_no_room_on_the_disk_is_stored_when_there_is_room(store, tmp_path):
    now = datetime.now(UTC)
    gateway, mirror, full = Gateway(), Mirror(store), []

    async def pause(_seconds):
        full.append(len(gateway.given))
        make_room(disk)

    with small_disk(tmp_path / "disk", "1m") as disk:
        private_directory(disk / "pki")
        renewal = CertificateRenewal(
            directory=disk / "pki",
            authority=Authority.create(now),
            mirror=mirror,
            hosts=(),
            hosts_from="--gateway-host",
            now=lambda: now,
            recorder=gateway,
            pause=pause,
        )
        tasks = [asyncio.create_task(mirror.run())]
        await mirror.ready.wait()
        renewal.install(gateway)
        await gateway.next()
        tasks.append(asyncio.create_task(renewal.run(gateway)))
        await asyncio.sleep(0)
        fill(disk)
        await store.create(Pool(metadata=Metadata(name="ci")))
        assert "ci.default.svc" in names(await gateway.next())
        assert full == [1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
