"""The API over HTTP: its responses, and errors that name every bad field."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bkpool.api import ApiLimits
from bkpool.core.errors import DiskFull
from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatStatus
from bkpool.core.resource import Metadata
from bkpool.core.worker import GatewayRegistration, Worker
from bkpool.pki.authority import Authority
from support.api import ADMIN, ALLOCATE, running_api, status_and_code


@pytest.fixture
async def api(tmp_path):
    async with running_api(tmp_path) as api:
        await api.world.pool(gateway={"maxTokenTTL": "2h"}, tls={"enabled": True})
        yield api


async def test_responses_are_those_of_the_contract(api):
    status, lease, _ = await api(
        "POST", ALLOCATE, {"poolName": "p", "namespace": "default", "ttl": "1h", "metadata": {"a": "b"}}
    )
    assert status == 200
    assert set(lease) == {
        *("workerName", "token", "endpoint", "gatewayEndpoint", "expiresAt", "caCert", "clientCert", "clientKey")
    }
    assert all(b"-----BEGIN " in base64.b64decode(lease[name]) for name in ("caCert", "clientCert", "clientKey"))
    assert lease["expiresAt"].endswith("Z")
    status, found, _ = await api("POST", "/api/v1/workers/lookup", {"token": lease["token"]}, headers={})
    assert (status, found) == (200, {"workerEndpoint": "unix:///0", "workerName": "p-worker-0", "poolName": "p"})
    status, renewed, _ = await api(
        "POST", "/api/v1/workers/renew", {"token": lease["token"], "ttl": "2h"}, headers={}
    )
    assert (status, renewed["workerName"]) == (200, "p-worker-0")
    status, reply, _ = await api("POST", "/api/v1/workers/release", {"token": lease["token"]}, headers={})
    assert (status, reply) == (200, {"status": "released"})


async def test_with_a_csr_no_key_is_created(api):
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM).decode()
    status, lease, _ = await api("POST", ALLOCATE, {"poolName": "p", "csr": pem})
    assert status == 200
    assert "clientKey" not in lease
    leaf = x509.load_pem_x509_certificate(base64.b64decode(lease["clientCert"]))
    assert leaf.public_key() == key.public_key()


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "poolName"),
        ([], 400, "the document"),
        ({"poolName": ""}, 400, "poolName"),
        ({"poolName": 7}, 400, "poolName"),
        ({"poolName": "p" * 300}, 400, "poolName"),
        ({"poolName": "P"}, 400, "poolName"),
        ({"poolName": "p", "namespace": "../x"}, 400, "namespace"),
        ({"poolName": "nope"}, 404, "poolName"),
        ({"poolName": "p", "namespace": "elsewhere"}, 404, "poolName"),
        ({"poolName": "p", "ttl": "banana"}, 400, "ttl"),
        ({"poolName": "p", "ttl": "-1h"}, 400, "ttl"),
        ({"poolName": "p", "ttl": "0s"}, 400, "ttl"),
        ({"poolName": "p", "ttl": "3h"}, 400, "ttl"),
        ({"poolName": "p", "ttl": "1000000h"}, 400, "ttl"),
        ({"poolName": "p", "ttl": "9" * 400 + "h"}, 400, "ttl"),
        ({"poolName": "p", "ttl": 3600}, 400, "ttl"),
        ({"poolName": "p", "wait": "2h"}, 400, "wait"),
        ({"poolName": "p", "wait": None}, 400, "wait"),
        ({"poolName": "p", "csr": "junk"}, 400, "csr"),
        ({"poolName": "p", "metadata": {"a": 1}}, 400, "metadata.a"),
        ({"poolName": "p", "metadata": {str(n): "" for n in range(65)}}, 400, "metadata"),
        ({"pool_name": "p"}, 400, "poolName"),
        ({"poolName": "p", "jobid": "x"}, 400, "jobid"),
    ],
)
async def test_an_error_names_the_bad_field(api, body, status, field):
    got, reply, _ = await api("POST", ALLOCATE, body)
    assert (got, reply["error"]["field"]) == (status, field)
    assert reply["error"]["message"]
    assert reply["error"]["hint"]
    assert not api.world.held(), "no lease is left"


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "InvalidInput"),
        (b"{", 400, "InvalidInput"),
        (b"\xff\xfe", 400, "InvalidInput"),
        (b"[" * 60_000, 400, "InvalidInput"),
        (b'{"poolName": "\\ud800"}', 400, "InvalidInput"),
        (json.dumps({"poolName": "x" * 1_000_000}).encode(), 413, None),
    ],
)
async def test_a_body_that_is_not_a_request_is_refused(api, data, status, code):
    got, reply, _ = await api("POST", ALLOCATE, data=data)
    assert got == status
    assert code is None or reply["error"]["code"] == code


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer x", f"Basic {ADMIN}", f"Bearer {ADMIN} x", "Bearer " + "x" * 5000]
)
async def test_an_unauthenticated_caller_gets_401_with_the_scheme(api, header):
    for method, path in (("POST", ALLOCATE), ("GET", "/api/v1/pools"), ("GET", "/api/v1/pools/p")):
        headers = {} if header is None else {"Authorization": header}
        status, reply, answer = await api(
            method, path, {"poolName": "p"} if method == "POST" else None, headers=headers
        )
        assert (status, reply["error"]["code"]) == (401, "Unauthenticated")
        assert answer["WWW-Authenticate"] == "Bearer"
        assert ADMIN not in json.dumps(reply)


async def test_a_pool_is_shown_with_its_workers_and_ignored_fields(api):
    await api("POST", ALLOCATE, {"poolName": "p", "jobId": "job-1"})
    status, reply, _ = await api("GET", "/api/v1/pools/p?namespace=default")
    assert status == 200
    assert [(w["name"], w["jobId"], w["requestedBy"]) for w in reply["members"]] == [("p-worker-0", "job-1", "admin")]
    assert [(w["connections"], w["allocatedAt"] < w["expiresAt"]) for w in reply["members"]] == [(0, True)]
    assert {c["type"]: c["message"] for c in reply["conditions"]}["IgnoredFields"] == "spec.tls"
    status, reply, _ = await api("GET", "/api/v1/pools")
    assert [pool["name"] for pool in reply["pools"]] == ["p"]
    assert (await api("GET", "/api/v1/pools/nope"))[0] == 404


async def test_the_connections_of_a_worker_are_those_that_its_gateway_has_said_last(api):
    """In its registration, or in the heartbeat that renews it."""
    await api("POST", ALLOCATE, {"poolName": "p"})
    mirror, store = api.world.replicas[0].mirror, api.world.store
    await api.world.until(lambda: any(one.lease and not one.undelivered for one in mirror.workers.values()))
    await api.world.asleep()
    worker = next(one for one in mirror.workers.values() if one.lease)
    now = datetime.now(UTC)
    entry = GatewayRegistration(
        gateway="g", lease_id=worker.lease.id, renewed_at=now, connections=2, heartbeat="default/g"
    )
    await store.replace_status((await store.get(Worker, *worker.key)).with_status(gateways=(entry,)))
    await api.world.until(lambda: mirror.workers[worker.key].status.gateways)

    async def shown():
        _, reply, _ = await api("GET", "/api/v1/pools/p?namespace=default")
        return [one["connections"] for one in reply["members"]]

    assert await shown() == [2]
    told = HeartbeatStatus(renewed_at=now + timedelta(seconds=20), leases={worker.lease.id: 5})
    beat = await store.create(GatewayHeartbeat(metadata=Metadata(name="g"), status=told))
    await api.world.until(lambda: beat.key in mirror.heartbeats.known)
    assert await shown() == [5]


async def test_tokens_without_a_lease_are_refused(api):
    for path in ("lookup", "renew", "release"):
        status, reply, _ = await api("POST", f"/api/v1/workers/{path}", {"token": "x" * 43}, headers={})
        assert (status, reply["error"]["code"]) == (404, "NoSuchLease")
        status, reply, _ = await api("POST", f"/api/v1/workers/{path}", {"token": ""}, headers={})
        assert (status, reply["error"]["field"]) == (400, "token")


async def test_anybody_learns_what_tokens_must_be_made_for(api):
    status, reply, _ = await api("GET", "/api/v1/audience", headers={})
    assert (status, reply) == (200, {"audience": "buildkit-controller"})


async def test_health_and_readiness(api):
    for path in ("/health", "/api/v1/health", "/ready", "/api/v1/ready"):
        assert (await api("GET", path, headers={}))[0] == 200
    api.trouble = "the appliance is stopping"
    assert (await api("GET", "/health", headers={}))[0] == 200
    status, reply, headers = await api("GET", "/ready", headers={})
    assert (status, reply["error"]["message"], headers["Retry-After"]) == (503, "the appliance is stopping", "2")
    assert (await api("POST", ALLOCATE, {"poolName": "p"}))[0] == 503


async def test_unknown_paths_and_methods_are_refused(api):
    assert (await api("GET", "/nowhere"))[1]["error"]["code"] == "NotFound"
    status, reply, headers = await api("GET", ALLOCATE)
    assert (status, headers["Allow"]) == (405, "POST")
    assert reply["error"]["code"] == "MethodNotAllowed"


async def test_a_crash_gives_one_sentence_and_no_traceback(api, monkeypatch):
    def boom(*_args, **_more):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Authority, "issue_client", boom)
    status, reply, _ = await api("POST", ALLOCATE, {"poolName": "p"})
    assert status == 500
    assert "secret detail" not in json.dumps(reply)


async def test_openapi_has_every_route_and_every_reference_resolves(api):
    status, document, _ = await api("GET", "/openapi.json", headers={})
    assert status == 200
    assert {"/api/v1/workers/allocate", "/api/v1/workers/renew", "/api/v1/pools/{name}", "/ready"} <= set(
        document["paths"]
    )
    schemas = document["components"]["schemas"]

    def references(node):
        if isinstance(node, dict):
            yield from (node["$ref"],) if "$ref" in node else ()
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references(document))
    assert "poolName" in schemas["AllocateBody"]["properties"]


async def test_the_longest_wait_is_a_limit(tmp_path):
    async with running_api(tmp_path, ApiLimits(max_wait=timedelta(milliseconds=50))) as api:
        await api.world.pool()
        api.world.runtime.may_start.clear()  # no worker becomes ready
        status, answer, _ = await api("POST", ALLOCATE, {"poolName": "p", "wait": "51ms"})
        assert (status, answer["error"]["field"]) == (400, "wait")
        assert answer["error"]["message"] == "the request is not valid: must be at most 50ms"
        for allowed in ({"wait": "50ms"}, {}):  # a caller who names no wait would wait for five minutes
            async with asyncio.timeout(60):
                status, answer, _ = await api("POST", ALLOCATE, {"poolName": "p", **allowed})
            assert status == 503
            assert "within 50ms" in answer["error"]["message"]


async def test_a_wait_may_be_longer_than_an_hour_where_the_limit_is(tmp_path):
    async with running_api(tmp_path, ApiLimits(max_wait=timedelta(hours=2))) as api:
        await api.world.pool()
        assert (await api("POST", ALLOCATE, {"poolName": "p", "wait": "2h"}))[0] == 200


async def test_the_largest_body_is_a_limit(tmp_path):
    async with running_api(tmp_path, ApiLimits(max_body=200_000)) as api:
        await api.world.pool()
        metadata = {str(number): "x" * 250 for number in range(64)}
        body = {"poolName": "p", "csr": "x" * 16_000, "metadata": metadata}
        text = json.dumps(body) + " " * 100_000
        headers = {"Authorization": f"Bearer {ADMIN}"}
        assert (await api("POST", ALLOCATE, data=text, headers=headers))[1]["error"]["field"] == "csr", "it was read"
        status, answer, _ = await api("POST", ALLOCATE, data=text + " " * 100_000, headers=headers)
        assert (status, answer["error"]["message"]) == (413, "the request body is larger than 200000 bytes")


async def test_without_room_on_the_disk_nothing_new_is_leased_and_all_else_is_answered(api):
    lease = (await api("POST", ALLOCATE, {"poolName": "p"}))[1]
    api.full = DiskFull("the file system /x is full", hint="Free some space there.")
    answer = await api("POST", ALLOCATE, {"poolName": "p"})
    assert status_and_code(answer) == (507, "DiskFull")
    assert answer[1]["error"]["hint"] == "Free some space there."
    assert (await api("POST", ALLOCATE, {"poolName": "p"}, bearer="nobody"))[0] == 401
    assert (await api("GET", "/api/v1/pools"))[0] == 200
    assert (await api("POST", "/api/v1/workers/renew", {"token": lease["token"]}))[0] == 200
    assert (await api("POST", "/api/v1/workers/release", {"token": lease["token"]}))[0] == 200
    api.full = None
    assert (await api("POST", ALLOCATE, {"poolName": "p"}))[0] == 200
