"""Who may do what over HTTP: two tenants must not learn about each other, and the audit trail names each decision."""

import asyncio
import gzip
import json

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bkpool.api import ApiLimits
from bkpool.core.auth import TokenFrom
from bkpool.identity import Identity, Scope
from bkpool.identity.access import LONGEST_BEARER
from bkpool.identity.static_token_parser import StaticTokens, parse_static_tokens
from support.api import ALLOCATE, running_api
from support.captured_logs import capture_logs
from support.examples import examples

ANN, BOB = "token-of-ann", "token-of-bob"
WORKERS = "/api/v1/workers"
CHECK = "/api/v1/auth/check"
RULES = {"rbac": {"rules": [{"users": ["ann", "group:dev"]}]}}


@pytest.fixture
async def api(tmp_path):
    """Both tenants may use pool p, only ann may use pool a."""
    async with running_api(tmp_path) as api:
        authority = {"authority": "https://issuer", "source": "stub"}
        api.authenticator.known = {
            ANN: (Identity("ann", groups=("dev",), tenant_name="team", **authority),),
            BOB: (Identity("bob", pools=("claimed",), **authority),),
        }
        api.authenticator.refused = {"stale": "it has expired"}
        await api.world.pool(auth={"rbac": {"rules": [{"users": ["ann", "bob"]}]}}, scaling={"max": 4})
        await api.world.pool("a", auth=RULES)
        yield api


@pytest.fixture
def audit():
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        yield lambda: [line for line in lines if line["event"] == "audit.decision"]


async def lease_of(api, bearer, **more):
    status, lease, _ = await api("POST", ALLOCATE, {"poolName": "p", **more}, bearer=bearer)
    assert status == 200, lease
    return lease


async def test_a_tenant_cannot_change_or_see_the_lease_of_another(api):
    lease = await lease_of(api, BOB, jobId="secret-job")
    name = lease["workerName"]
    nothing = {"workerName": "p-worker-3"}
    for path in ("renew", "release"):
        about_bobs = await api("POST", f"{WORKERS}/{path}", {"workerName": name}, bearer=ANN)
        about_none = await api("POST", f"{WORKERS}/{path}", nothing, bearer=ANN)
        assert about_bobs[0] == 404
        assert json.dumps(about_bobs[1]).replace(name, "") == json.dumps(about_none[1]).replace("p-worker-3", "")
        assert (await api("POST", f"{WORKERS}/{path}", {"workerName": name}, bearer=None))[0] == 401
    assert (await api("POST", f"{WORKERS}/lookup", {"workerName": name}, bearer=ANN))[0] == 400

    status, seen, _ = await api("GET", "/api/v1/pools/p", bearer=ANN)
    assert status == 200
    assert seen["members"] == [{"name": name, "phase": "Allocated"}]
    assert "bob" not in json.dumps(seen)
    assert "secret-job" not in json.dumps(seen)
    (own,) = (await api("GET", "/api/v1/pools/p", bearer=BOB))[1]["members"]
    assert (own["jobId"], own["requestedBy"]) == ("secret-job", "bob")
    assert (await api("GET", "/api/v1/pools/p"))[1]["members"] == [own], "the admin sees everything"

    assert (await api("POST", f"{WORKERS}/renew", {"workerName": name, "ttl": "10m"}, bearer=BOB))[0] == 200
    assert (await api("POST", f"{WORKERS}/release", {"workerName": name}, bearer=BOB))[1] == {"status": "released"}
    await api.world.until(lambda: not api.world.held())
    (idle,) = (await api("GET", "/api/v1/pools/p", bearer=ANN))[1]["members"]
    assert set(idle) == {"name", "phase"}, "when somebody else last used it is not hers to know"


async def test_the_admin_may_end_a_lease_by_its_worker(api):
    lease = await lease_of(api, BOB)
    assert (await api("POST", f"{WORKERS}/release", {"workerName": lease["workerName"]}))[0] == 200


@pytest.mark.parametrize(
    "body", [{}, {"token": "x" * 43, "workerName": "p-worker-0"}, {"workerName": "../p"}, {"workerName": None}]
)
async def test_a_request_must_name_the_lease_in_exactly_one_way(api, body):
    for path in ("renew", "release"):
        assert (await api("POST", f"{WORKERS}/{path}", body, bearer=ANN))[0] == 400


async def test_pools_that_a_caller_may_not_use_look_as_if_they_did_not_exist(api):
    for bearer, names in ((ANN, ["a", "p"]), (BOB, ["p"])):
        pools = (await api("GET", "/api/v1/pools", bearer=bearer))[1]["pools"]
        assert [pool["name"] for pool in pools] == names
    status, reply, _ = await api("POST", ALLOCATE, {"poolName": "a"}, bearer=BOB)
    assert (status, reply["error"]["code"]) == (403, "Forbidden")
    assert (
        reply["error"]["message"]
        == "bob may not use pool default/a: no rule in spec.auth.rbac.rules of the pool names this caller"
    )
    assert (await api("GET", "/api/v1/pools/a", bearer=BOB))[0] == 403
    for name in ("nope", "claimed"):
        status, reply, _ = await api("POST", ALLOCATE, {"poolName": name}, bearer=BOB)
        assert status == 403
        assert "there is no pool of this name that they may use" in reply["error"]["message"]
        assert (await api("GET", f"/api/v1/pools/{name}", bearer=BOB))[0] == 403
        assert (await api("POST", ALLOCATE, {"poolName": name}))[0] == 404, (
            "an admin may know that the pool does not exist"
        )
    assert not api.world.held()


class OneSecretHangs:
    """Reads the Secret `good`, and never any other."""

    async def read(self, _namespace: str, source: TokenFrom) -> StaticTokens:
        if source.secret_ref != "good":
            await asyncio.Event().wait()
        return parse_static_tokens({"carl": "token-of-carl-at-the-good-pool"})


async def test_the_secret_of_one_pool_delays_neither_the_admin_nor_callers_of_other_pools(tmp_path):
    hangs = OneSecretHangs()
    async with running_api(tmp_path, reader=hangs, others_timeout=0.1) as api, asyncio.timeout(60):
        api.authenticator.known = {BOB: (Identity("bob"),)}
        for name in ("good", "bad", "worse"):
            methods = [{"type": "token", "token": {"secretRef": name}}]
            await api.world.pool(name, auth={"methods": methods, "rbac": {"rules": [{"users": ["bob", "carl"]}]}})
        carl = "token-of-carl-at-the-good-pool"
        for bearer in ("a" * 43, BOB, carl):
            lease = (await api("POST", ALLOCATE, {"poolName": "good"}, bearer=bearer))[1]
            assert (await api("GET", "/api/v1/pools/good", bearer=bearer))[0] == 200
            named = {"workerName": lease["workerName"]}
            assert (await api("POST", f"{WORKERS}/release", named, bearer=bearer))[0] == 200
            body = {"poolName": "good", "token": carl}
            assert (await api("POST", CHECK, body, bearer=bearer))[1]["allowed"]
        pools = (await api("GET", "/api/v1/pools", bearer=carl))[1]["pools"]
        assert [pool["name"] for pool in pools] == ["good"]


async def test_without_configured_access_every_authenticated_caller_may_use_all_pools(tmp_path):
    async with running_api(tmp_path) as api:
        api.authenticator.known = {BOB: (Identity("bob"),)}
        await api.world.pool()
        assert (await api("POST", ALLOCATE, {"poolName": "p"}, bearer=BOB))[0] == 200
        assert (await api("POST", ALLOCATE, {"poolName": "nope"}, bearer=BOB))[0] == 404
        assert (await api("POST", ALLOCATE, {"poolName": "p"}, bearer="unknown"))[0] == 401
        assert (await api("POST", CHECK, {"token": "unknown", "poolName": "nope"}, bearer=None))[0] == 200


async def test_of_several_identities_the_one_with_access_is_used(api):
    api.authenticator.known["both"] = (
        Identity("ann", source="elsewhere", scope=Scope("other")),
        Identity("bob", source="here"),
    )
    await lease_of(api, "both")
    assert api.world.held()[0].held_lease.requested_by == "bob"


async def test_jobs_are_per_identity_and_not_per_name(api):
    api.authenticator.known["other-bob"] = (Identity("bob", authority="https://another"),)
    first, again, others = [await lease_of(api, bearer, jobId="j") for bearer in (BOB, BOB, "other-bob")]
    assert first["token"] == again["token"]
    assert others["token"] != first["token"]
    body = {"workerName": first["workerName"]}
    assert (await api("POST", f"{WORKERS}/release", body, bearer="other-bob"))[0] == 404


async def test_a_refusal_by_a_limit_says_when_to_try_again(api, audit):
    await api.world.pool(
        "few", auth={"limits": {"identity": {"perMinute": 2, "leases": 5}}, "rbac": {"enabled": False}}
    )
    body = {"poolName": "few"}
    for _ in range(2):
        assert (await api("POST", ALLOCATE, {**body, "jobId": "j"}, bearer=ANN))[0] == 200
    assert (await api("POST", ALLOCATE, body, bearer=ANN))[0] == 200, "a job that finds its lease did not count"
    api.world.clock.advance(seconds=20)
    status, reply, headers = await api("POST", ALLOCATE, body, bearer=ANN)
    assert (status, reply["error"]["code"], headers["Retry-After"]) == (429, "LimitReached", "40")
    assert "spec.auth.limits.identity.perMinute: ann may ask 2 times" in reply["error"]["message"]
    assert (audit()[-1]["decision"], audit()[-1]["reason"]) == ("denied", reply["error"]["message"])
    assert (await api("POST", ALLOCATE, body, bearer=BOB))[0] == 200
    api.world.clock.advance(seconds=40)
    assert (await api("POST", ALLOCATE, body, bearer=ANN))[0] == 200


async def test_the_authorization_header(api):
    for scheme in ("bearer", "BEARER", "Bearer  "):
        assert (await api("GET", "/api/v1/pools", headers={"Authorization": f"{scheme} {ANN}"}))[0] == 200
    two = [("Authorization", f"Bearer {ANN}"), ("Authorization", f"Bearer {BOB}")]
    for headers in (two, [two[0], two[0]]):
        status, reply, _ = await api("GET", "/api/v1/pools", headers=headers)
        assert status == 401
        assert "more than one" in reply["error"]["message"]
    longest = "x" * LONGEST_BEARER
    api.authenticator.known[longest] = api.authenticator.known[ANN]
    assert (await api("GET", "/api/v1/pools", bearer=longest))[0] == 200
    assert (await api("GET", "/api/v1/pools", bearer=longest + "x"))[0] == 401
    status, reply, _ = await api("GET", "/api/v1/pools", bearer="stale")
    assert (status, "it has expired" in reply["error"]["message"]) == (401, True)


@pytest.mark.parametrize(
    "header", [b"Bearer " + b"sesame" * 200_000, b"Bearer sesame\0", b"Bearer \xffsesame", b"sesame" * 4000]
)
async def test_a_malformed_header_gets_a_clean_response_and_is_not_logged(api, header, capfd, caplog):
    request = b"GET /api/v1/pools HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + header + b"\r\n\r\n"
    answer = await api.raw(request)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] in {b"400", b"401"}
    assert set(json.loads(body)["error"]) >= {"code", "message", "hint"}
    reply = capfd.readouterr()
    assert "sesame" not in f"{answer}{reply.out}{reply.err}{caplog.text}"


async def test_auth_check_explains_its_decision(api, audit):
    async def explained(token, pool="a", bearer=None):
        status, reply, _ = await api("POST", CHECK, {"token": token, "poolName": pool}, bearer=bearer)
        assert status == 200
        assert token not in json.dumps(reply)
        return reply

    assert await explained(ANN) == {
        "allowed": True,
        "reason": "spec.auth.rbac.rules[0] of the pool",
        "identity": {
            "name": "ann",
            "authority": "https://issuer",
            "source": "stub",
            "groups": ["dev"],
            "pools": [],
            "tenant": "team",
        },
    }
    refused = await explained(BOB, bearer=ANN)
    assert (refused["allowed"], refused["identity"]["pools"]) == (False, ["claimed"])
    assert "no rule in spec.auth.rbac.rules of the pool names" in refused["reason"]
    assert "verdicts" not in refused, "only the admin sees what each configuration says"
    assert await explained("stale") == {"allowed": False, "reason": "the bearer token is refused: it has expired"}
    assert "no pool of this name" in (await explained(BOB, "nope"))["reason"]
    assert (await explained(BOB, bearer="rubbish"))["allowed"] is False
    assert (await explained("stale", bearer="a" * 43))["verdicts"] == [
        {"source": "stub", "known": False, "reason": "it has expired"}
    ]
    assert (await api("POST", CHECK, {"token": ANN, "poolName": "nope"}))[0] == 404, "the admin asks"
    for token in ("no token", "x" * (LONGEST_BEARER + 1), 7, ["sesame"], ""):
        status, reply, _ = await api("POST", CHECK, {"token": token, "poolName": "a"}, bearer=None)
        assert (status, reply["error"]["field"]) == (400, "token")
        assert "sesame" not in json.dumps(reply)
        assert "xxx" not in json.dumps(reply)
    lines = audit()
    assert [(line["decision"], line.get("identity")) for line in lines[:3]] == [
        ("allowed", "ann"),
        ("denied", "bob"),
        ("denied", None),
    ]
    assert {line["action"] for line in lines} == {"auth-check"}


async def test_the_audit_trail(api, audit):
    api.world.clock.advance(seconds=0)
    lease = await lease_of(api, ANN)
    _, _, headers = await api("GET", "/api/v1/pools/a", bearer=BOB)
    await api("GET", "/api/v1/pools", bearer=BOB)
    await api("POST", ALLOCATE, {"poolName": "p"}, bearer="rubbish")
    await api("POST", ALLOCATE, {"poolName": "p"}, bearer="stale")
    await api("POST", f"{WORKERS}/lookup", {"token": lease["token"]}, bearer=None)
    await api("POST", f"{WORKERS}/lookup", {"token": "x" * 43}, bearer=None)
    await api("POST", f"{WORKERS}/renew", {"workerName": lease["workerName"]}, bearer=ANN)
    await api("POST", f"{WORKERS}/release", {"workerName": lease["workerName"]}, bearer=BOB)
    await api("POST", f"{WORKERS}/release", {"token": lease["token"]}, bearer=None)
    await api("POST", ALLOCATE, {"poolName": "a", "wait": "0s"}, bearer=ANN)
    assert [
        (line["action"], line["decision"], line.get("identity"), line.get("pool"), line.get("failure"))
        for line in audit()
    ] == [
        ("allocate", "allowed", "ann", "default/p", None),
        ("pool", "denied", "bob", "default/a", None),
        ("pools", "allowed", "bob", None, None),
        ("allocate", "denied", None, None, None),
        ("allocate", "denied", None, None, None),
        ("lookup", "allowed", "ann", "default/p", None),
        ("lookup", "denied", None, None, None),
        ("renew", "allowed", "ann", "default/p", None),
        ("release", "denied", "bob", None, None),
        ("release", "allowed", "ann", "default/p", None),
        ("allocate", "allowed", "ann", "default/a", "NoCapacity"),
    ]
    first, second, *_ = lines = audit()
    assert first["reason"] == "spec.auth.rbac.rules[0] of the pool"
    assert (first["authority"], first["source"], first["remote"]) == ("https://issuer", "stub", "127.0.0.1")
    assert first["worker"] == "default/p-worker-0"
    assert {line["allocation"] for line in lines if line["action"] == "renew"} == {first["allocation"]}
    assert second["request_id"] == headers["X-Request-Id"]
    assert len({line["request_id"] for line in lines}) == len(lines)
    for secret in (lease["token"], lease["clientKey"], ANN, BOB, "rubbish", "x" * 43):
        assert secret not in json.dumps(lines)


async def test_the_audit_line_names_the_job_of_the_token(api, audit):
    job = (("jti", "t-1"), ("run_id", "42"), ("sub", "repo:o/r:ref:refs/heads/main"))
    api.authenticator.known["of-a-job"] = (Identity("ann", authority="https://issuer", source="stub", job=job),)
    await lease_of(api, "of-a-job")
    (line,) = audit()
    assert (line["action"], line["jti"], line["run_id"], line["sub"]) == ("allocate", *(text for _, text in job))
    assert line["identity"] == "ann"


async def test_a_caller_who_closes_the_connection_while_waiting_is_in_the_audit_trail(api, audit):
    api.world.runtime.may_start.clear()
    asking = asyncio.create_task(api("POST", ALLOCATE, {"poolName": "a"}, bearer=ANN))
    await api.world.until(api.world.held)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await api.world.until(audit)
    assert [(line["decision"], line["failure"]) for line in audit()] == [("allowed", "CancelledError")]


# --- anything at all ------------------------------------------------------------------------------------------------

ANYTHING = settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["poolName", "namespace", "token", "workerName", "ttl", "wait", "jobId", "csr", "metadata"])
PATHS = st.sampled_from([ALLOCATE, f"{WORKERS}/renew", f"{WORKERS}/release", f"{WORKERS}/lookup", CHECK])


def clean(answer: bytes) -> None:
    """Asserts one response that is not an internal error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert 400 <= int(head.split()[1]) < 500, answer
    assert "error" in json.loads(body)


@ANYTHING
@given(path=PATHS, body=st.binary(max_size=200) | st.dictionaries(FIELDS, JSON, max_size=5).map(json.dumps))
async def test_every_body_gets_a_response(api, path, body):
    data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    status, reply, _ = await api("POST", path, data=data, bearer=ANN)
    assert 400 <= status < 500
    assert reply["error"]["message"]


LINE = st.binary(max_size=60).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
HEADERS = [b"Authorization", b"Content-Encoding", b"Content-Type", b"Expect", b"Transfer-Encoding", b"Cookie"]


@ANYTHING
@given(value=LINE, name=st.sampled_from(HEADERS))
async def test_every_header_gets_a_response(api, name, value):
    head = b"POST " + ALLOCATE.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
    authorization = b"" if name == b"Authorization" else b"Authorization: Bearer " + ANN.encode() + b"\r\n"
    clean(await api.raw(head + authorization + name + b": " + value + b"\r\n\r\n{}"))


@ANYTHING
@given(path=LINE)
async def test_every_path_gets_a_response(api, path):
    head = b"Host: x\r\nConnection: close\r\nAuthorization: Bearer " + ANN.encode() + b"\r\n\r\n"
    for prefix in (b"/nowhere/", b"/api/v1/pools/x", b"/api/v1/pools/a?namespace=x"):
        clean(await api.raw(b"GET " + prefix + path + b" HTTP/1.1\r\n" + head))


@ANYTHING
@given(junk=st.binary(max_size=200), tail=st.sampled_from([b"", b"\r\n0\r\n\r\n"]))
async def test_every_chunked_body_gets_a_response(api, junk, tail):
    head = b"Host: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nAuthorization: Bearer " + ANN.encode()
    answer = await api.raw(b"POST " + ALLOCATE.encode() + b" HTTP/1.1\r\n" + head + b"\r\n\r\n" + junk + tail, 0.1)
    if answer:  # else there are chunks to come
        clean(answer)


async def test_a_body_may_be_announced_with_expect(api):
    head = b"POST " + ALLOCATE.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
    going_on, _, answer = (await api.raw(head + b"Expect: 100-continue\r\n\r\n{}")).partition(b"\r\n\r\n")
    assert going_on == b"HTTP/1.1 100 Continue"
    clean(answer)
    nowhere = await api.raw(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: \xff\r\n\r\n")
    clean(nowhere)


async def test_a_body_that_does_not_arrive_is_refused_in_time(tmp_path):
    head = b"POST " + CHECK.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{"
    async with running_api(tmp_path, ApiLimits(body_timeout=0.05)) as api:
        answer = await api.raw(head, until=b"}}")  # aiohttp keeps the connection a while, for what may still come
    clean(answer)
    assert b"malformed or arrives too slowly" in answer


async def test_a_compressed_body_is_not_decompressed(api):
    body = gzip.compress(json.dumps({"poolName": "p", "metadata": {"a": "b" * 10_000_000}}).encode())
    headers = {"Authorization": f"Bearer {ANN}", "Content-Encoding": "gzip"}
    status, reply, _ = await api("POST", ALLOCATE, data=body, headers=headers)
    assert (status, reply["error"]["field"]) == (400, "body")


# --- revoking -------------------------------------------------------------------------------------------------------

REVOKE = f"{WORKERS}/revoke"


async def test_a_caller_revokes_their_own_leases_and_the_admin_any(api, audit):
    anns, bobs = await lease_of(api, ANN, jobId="a-job"), await lease_of(api, BOB)
    status, reply, _ = await api("POST", REVOKE, {"poolName": "p"}, bearer=ANN)
    assert status == 200
    (ended,) = reply["revoked"]
    lease_id = ended.pop("leaseId")
    assert ended == {
        "workerName": anns["workerName"],
        "namespace": "default",
        "poolName": "p",
        "jobId": "a-job",
        "requestedBy": "ann",
        "tenant": "team",
    }
    assert reply["failed"] == []
    assert "bob" not in json.dumps(reply)
    line = audit()[-1]
    assert (line["action"], line["decision"], line["identity"]) == ("revoke", "allowed", "ann")
    assert (line["selection"], line["revoked"], line["failed"]) == ("pool default/p", "1", "0")
    assert line["reason"] == "callers may revoke their own leases"
    gone = await api("POST", f"{WORKERS}/renew", {"token": anns["token"]}, headers={})
    assert (gone[0], gone[1]["error"]["code"]) == (410, "LeaseEnded")
    assert "revoked" in gone[1]["error"]["message"]
    assert "by its maker" in gone[1]["error"]["message"]

    status, reply, _ = await api("POST", REVOKE, {"workerName": bobs["workerName"]}, bearer=ANN)
    assert (status, reply["error"]["code"]) == (404, "NoSuchLease")
    assert (await api("POST", REVOKE, {"identity": "bob"}, bearer=ANN))[1]["revoked"] == []
    assert (await api("POST", REVOKE, {"identity": "bob"}, bearer=None))[0] == 401
    (ended,) = (await api("POST", REVOKE, {"identity": "bob"}))[1]["revoked"]
    assert ended["workerName"] == bobs["workerName"]
    assert audit()[-1]["reason"] == "the admin may"
    assert lease_id != ended["leaseId"]


async def test_a_lease_is_revoked_by_the_id_that_its_owner_sees(api):
    lease = await lease_of(api, BOB)
    (seen,) = (await api("GET", "/api/v1/pools/p", bearer=BOB))[1]["members"]
    (ended,) = (await api("POST", REVOKE, {"leaseId": seen["leaseId"]}, bearer=BOB))[1]["revoked"]
    assert ended["workerName"] == lease["workerName"]


async def test_release_now_needs_what_release_needs(api, audit):
    lease = await lease_of(api, BOB)
    by_worker = {"workerName": lease["workerName"], "now": True}
    assert (await api("POST", f"{WORKERS}/release", by_worker, bearer=ANN))[0] == 404
    assert (await api("POST", f"{WORKERS}/release", by_worker, bearer=None))[0] == 401
    body = {"token": lease["token"], "now": True}
    assert (await api("POST", f"{WORKERS}/release", body, headers={}))[1] == {"status": "released"}
    assert audit()[-1]["now"] == "true"
    gone = await api("POST", f"{WORKERS}/lookup", {"token": lease["token"]}, headers={})
    assert "(revoked): with its token" in gone[1]["error"]["message"]
    assert (await api("POST", f"{WORKERS}/release", body, headers={}))[0] == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "leaseId"),
        ({"namespace": "default"}, "leaseId"),
        ({"identity": "bob", "poolName": "p"}, "poolName"),
        ({"identity": ""}, "identity"),
        ({"identity": 7}, "identity"),
        ({"tenant": "x" * 300}, "tenant"),
        ({"workerName": "../p"}, "workerName"),
        ({"identity": "bob", "namespace": "../x"}, "namespace"),
        ({"identity": "bob", "now": True}, "now"),
    ],
)
async def test_a_revocation_must_name_the_leases_in_exactly_one_way(api, body, field):
    await lease_of(api, BOB)
    status, reply, _ = await api("POST", REVOKE, body)
    assert (status, reply["error"]["field"]) == (400, field)
    assert len(api.world.held()) == 1
    assert api.world.held()[0].lease.ended_at is None
