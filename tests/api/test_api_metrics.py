"""The API's metrics: requests by route and code, durations, waiting callers, and leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.api import ADMIN, ALLOCATE, Api, running_api
from support.world import POOL


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(tmp_path) as api:
        await api.world.pool(scaling={"max": 1})
        yield api


def requests(api: Api, route: str, method: str, code: str) -> float | None:
    labels = {"route": route, "method": method, "code": code}
    return api.registry.get_sample_value("buildkit_api_requests_total", labels)


def gauge(api: Api, name: str) -> float | None:
    return api.registry.get_sample_value(name, {"pool": "p", "pool_namespace": "default"})


async def test_requests_are_counted_by_the_template_of_their_route(api: Api) -> None:
    await api("GET", "/api/v1/pools/p")
    await api("GET", "/api/v1/pools/nope")
    await api("GET", "/api/v1/pools/p", bearer="x")
    route = "/api/v1/pools/{name}"
    assert [requests(api, route, "GET", code) for code in ("200", "404", "401")] == [1, 1, 1]
    count = api.registry.get_sample_value("buildkit_api_request_duration_seconds_count", {"route": route})
    assert count == 3


async def test_each_code_that_a_route_may_answer_has_a_series_from_the_start(api: Api) -> None:
    codes = ("200", "400", "401", "403", "404", "413", "429", "500", "502", "503")
    assert {code: requests(api, ALLOCATE, "POST", code) for code in codes} == dict.fromkeys(codes, 0)
    assert requests(api, "/api/v1/ready", "GET", "503") == 0
    assert requests(api, "/api/v1/ready", "GET", "401") is None


async def test_labels_contain_nothing_that_a_caller_sends(api: Api) -> None:
    await api("GET", "/secret-path")
    await api("PATCH", ALLOCATE)
    await api.raw(f"BREW /secret HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n\r\n".encode(), until=b"}}")
    assert requests(api, "unmatched", "GET", "404") == 1
    assert requests(api, "unmatched", "PATCH", "405") == 1
    labels = {
        value for family in api.registry.collect() for sample in family.samples for value in sample.labels.values()
    }
    assert not {label for label in labels if "secret" in label or "BREW" in label or ADMIN in label}


async def test_waiting_callers_and_leases_are_counted_by_pool(api: Api) -> None:
    assert (gauge(api, "buildkit_api_waiters"), gauge(api, "buildkit_api_leases")) == (0, 0)
    _, lease, _ = await api("POST", ALLOCATE, {"poolName": "p"})
    second = asyncio.create_task(api("POST", ALLOCATE, {"poolName": "p", "jobId": "second"}))
    await api.world.until(lambda: api.world.replicas[0].allocator.waiting(POOL) == 1)
    assert (gauge(api, "buildkit_api_waiters"), gauge(api, "buildkit_api_leases")) == (1, 1)

    await api("POST", "/api/v1/workers/release", {"token": lease["token"]})
    await second
    assert (gauge(api, "buildkit_api_waiters"), gauge(api, "buildkit_api_leases")) == (0, 1)
    assert requests(api, ALLOCATE, "POST", "200") == 2


async def test_a_caller_who_closes_the_connection_is_counted_as_499(api: Api) -> None:
    await api("POST", ALLOCATE, {"poolName": "p"})
    waiting = asyncio.create_task(api("POST", ALLOCATE, {"poolName": "p", "jobId": "second"}))
    await api.world.until(lambda: api.world.replicas[0].allocator.waiting(POOL) == 1)
    waiting.cancel()
    await api.world.until(lambda: requests(api, ALLOCATE, "POST", "499") == 1)
    assert gauge(api, "buildkit_api_waiters") == 0
