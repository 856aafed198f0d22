from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest

from bkpool.core.worker import Lease
from support.certificates import HOUR, NOW, CertificateFactory
from support.gateway_world import GatewayWorld, NewWorld, gateway_worlds
from support.loops import open_libuv_pipe
from support.peers import NewRelay, relays


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def worker_lease() -> Lease:
    return Lease(
        id="allocation-1",
        token_sha256="digest",
        requested_by="me",
        owner="owner",
        allocated_at=NOW,
        expires_at=NOW + HOUR,
        not_after=NOW + 24 * HOUR,
    )


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateFactory:
    return CertificateFactory(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def foreign_ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateFactory:
    return CertificateFactory(tmp_path_factory.mktemp("foreign-ca"))


@pytest.fixture(params=["unix", "tls"])
def worker_family(request: pytest.FixtureRequest) -> str:
    family: str = request.param
    return family


@pytest.fixture
async def new_relay(ca: CertificateFactory, worker_family: str) -> AsyncIterator[NewRelay]:
    async with relays(ca, worker_family) as make:
        yield make


@pytest.fixture(scope="session")
def _libuv() -> None:
    open_libuv_pipe()


@pytest.fixture
async def new_world(ca: CertificateFactory, tmp_path: Path, _libuv: None) -> AsyncIterator[NewWorld]:
    async with gateway_worlds(ca, tmp_path) as make:
        yield make


@pytest.fixture
async def world(new_world: NewWorld) -> GatewayWorld:
    return await new_world()
