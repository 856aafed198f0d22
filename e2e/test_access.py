"""Access with the real program: tokens of an issuer, rules, unknown callers, and what the API shows to them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from harness import Appliance, eventually, free_port, oidc_config, only_on, pool
from support.issuer import forge, signing_key

ALLOCATE = "/api/v1/workers/allocate"


def rules(*users: str) -> dict[str, object]:
    return {"rbac": {"rules": [{"users": list(users), "pools": ["*"]}]}}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tools, world, issuer) -> Iterator[Appliance]:
    """An appliance with one issuer for two audiences. For one of them only tokens of one organisation are valid."""
    appliance = Appliance(tmp_path_factory.mktemp("guarded"), tools, world=world)
    mine = [{"claim": "repository_owner", "values": ["my-org"]}, {"claim": "ref", "patterns": ["refs/heads/*"]}]
    mapping = {"user": "actor", "groups": "teams", "pools": "may_use"}
    own = {"type": "oidc", "oidc": {"issuer": issuer.url, "audience": "other"}}
    two = {"scaling": {"max": 2}}
    appliance.up_from(
        [
            oidc_config("ci", issuer=issuer.url, audience="ci", claimsMapping=mapping, conditions=mine),
            oidc_config("world", issuer="https://gitlab.com", audience="ci"),
            oidc_config("off", issuer=issuer.url, audience="off", enabled=False, pools=["*"]),
            pool("alices", **two, auth=rules("alice", "group:builders")),
            pool("bobs", **two, auth=rules("bo?")),
            pool("unruled", **two),
            pool("own", **two, auth={"methods": [own]}),
        ]
    )
    yield appliance
    appliance.finish()


@pytest.fixture
def job(issuer):
    """Returns the token of a job, as a CI platform issues it."""

    def token(actor: str = "alice", **claims: object) -> str:
        return issuer.token(
            **{"aud": "ci", "actor": actor, "repository_owner": "my-org", "ref": "refs/heads/main", **claims}
        )

    return token


def test_a_job_builds_with_the_token_of_its_platform(guarded, job, context):
    context.dockerfile("say let-in")
    done = guarded.cli("build", "--pool", "alices", str(context.path), BKCTL_TOKEN=job()).ok()
    assert "let-in" in done.text
    eventually(lambda: guarded.pool("alices")["allocated"] == 0, "the lease is over")


@only_on("process", "claims are judged without the backend; the other tests show that pools and issuers arrive there")
@pytest.mark.parametrize(
    ("actor", "claims", "name", "status", "expected_message"),
    [
        ("alice", {}, "alices", 200, ""),
        ("carol", {"teams": ["others", "builders"]}, "alices", 200, ""),
        ("bob", {}, "bobs", 200, ""),
        ("dave", {"may_use": ["unruled"]}, "unruled", 200, ""),
        ("dave", {"may_use": "default/unruled"}, "unruled", 200, ""),
        ("dave", {"may_use": ["*"]}, "unruled", 403, "neither the token nor its issuer grants this pool"),
        (
            "dave",
            {"may_use": ["alices"]},
            "alices",
            403,
            "no rule in spec.auth.rbac.rules of the pool names this caller",
        ),
        ("bob", {}, "alices", 403, "bob may not use pool default/alices"),
        ("bobby", {}, "bobs", 403, "bobby may not use"),
        ("alice", {}, "own", 403, "is not valid for this pool|nor its issuer grants"),
        ("alice", {}, "nope", 403, "may not use|may use"),
        ("alice", {"repository_owner": "evil"}, "alices", 403, "repository_owner"),
        ("alice", {"repository_owner": None}, "alices", 403, "repository_owner"),
        ("alice", {"ref": "refs/pull/1/merge"}, "alices", 403, "ref"),
        ("system:admin", {}, "alices", 403, "system:"),
        ("alice", {"aud": "other"}, "own", 200, ""),
        ("alice", {"aud": "other"}, "alices", 403, "is not valid for this pool"),
        ("alice", {"aud": "off"}, "unruled", 401, "audience|aud"),
        ("alice", {"aud": "someone-else"}, "alices", 401, "audience|aud"),
        ("alice", {"exp": int(time.time()) - 60}, "alices", 401, "expired"),
        ("alice", {"exp": None}, "alices", 401, "exp"),
        ("alice", {"nbf": int(time.time()) + 86_400}, "alices", 401, "not valid|nbf"),  # from the collection on
        ("alice", {"iss": "http://127.0.0.1:1"}, "alices", 401, "issuer|iss"),
    ],
)
def test_only_callers_with_access_get_a_worker(guarded, job, actor, claims, name, status, expected_message):
    token = job(actor, **claims)
    got, body = guarded.http("POST", ALLOCATE, {"poolName": name, "wait": "60s"}, bearer=token)
    assert got == status, body
    if status == 200:
        guarded.release(body).ok()
    else:
        assert any(part in body["error"]["message"] for part in expected_message.split("|")), body
        assert "Traceback" not in json.dumps(body)


@only_on("process", "tokens are checked without the backend; e2e/kind/test_identities.py has those of a cluster")
def test_hostile_tokens_are_refused(guarded, issuer):
    claims = issuer.claims(aud="ci", actor="alice", repository_owner="my-org", ref="refs/heads/main")
    public = json.dumps(issuer.keys[0].jwk).encode()
    headers = {"alg": "RS256", "kid": "key-1"}
    key = issuer.keys[0]
    hostile = {
        "alg none": forge({"alg": "none"}, claims, None),
        "keyed with the public key": forge({"alg": "HS256", "kid": "key-1"}, claims, None) + "AAAA",
        "another's key": forge(headers, claims, signing_key("elsewhere")),
        "unknown kid": forge({**headers, "kid": "nobody"}, claims, key),
        "kid with junk": forge({**headers, "kid": "../../etc/passwd' OR 1=1 --"}, claims, key),
        "crit": forge({**headers, "crit": ["exp"]}, claims, key),
        "its own key": forge({**headers, "kid": "mine", "jwk": json.loads(public)}, claims, signing_key("mine")),
        "twice": forge(headers, b'{"actor":"alice",' + json.dumps(claims).encode()[1:], key),
    }
    for name, token in hostile.items():
        status, body = guarded.http("POST", ALLOCATE, {"poolName": "alices"}, bearer=token)
        assert (name, status) == (name, 401), body
        assert "refused" in body["error"]["message"], body
    eventually(lambda: guarded.pool("alices")["allocated"] == 0, "no lease but those that were released before")


def test_only_pools_that_the_caller_may_use_are_listed(guarded, job):
    status, body = guarded.http("GET", "/api/v1/pools", bearer=job("bob"))
    assert (status, [pool["name"] for pool in body["pools"]]) == (200, ["bobs"])
    assert guarded.http("GET", "/api/v1/pools/alices", bearer=job("bob"))[0] == 403
    assert {pool["name"] for pool in guarded.http("GET", "/api/v1/pools")[1]["pools"]} == {
        *("alices", "bobs", "unruled", "own")
    }


def test_a_caller_sees_nothing_of_the_caller_before(guarded, job):
    _, lease = guarded.http("POST", ALLOCATE, {"poolName": "alices", "jobId": "secret-job"}, bearer=job("alice"))
    carol = job("carol", teams=["builders"])
    _, body = guarded.http("GET", "/api/v1/pools/alices", bearer=carol)
    assert "secret-job" not in json.dumps(body)
    by_name = {"workerName": lease["workerName"]}
    for verb in ("release", "renew"):
        assert guarded.http("POST", f"/api/v1/workers/{verb}", by_name, bearer=carol)[0] == 404
        assert guarded.http("POST", f"/api/v1/workers/{verb}", by_name, bearer=None)[0] == 401
    _, other = guarded.http("POST", ALLOCATE, {"poolName": "alices", "jobId": "secret-job"}, bearer=carol)
    assert other["workerName"] != lease["workerName"], "two callers may use the same job name"
    assert guarded.http("POST", "/api/v1/workers/renew", by_name, bearer=job("alice"))[0] == 200
    assert guarded.http("POST", "/api/v1/workers/release", by_name, bearer=job("alice"))[0] == 200
    guarded.release(other).ok()


def test_auth_check_explains_its_decision(guarded, job, tmp_path):
    (tmp_path / "token").write_text(job("bob"))
    for name, code in (("bobs", 0), ("alices", 4)):
        answer = guarded.cli("auth", "check", "--token-file", str(tmp_path / "token"), "--pool", name)
        assert answer.code == code, answer.text
        assert answer.json["allowed"] is (code == 0)
    assert "no rule in spec.auth.rbac.rules of the pool names" in answer.json["reason"]


def test_decisions_and_leases_are_in_the_audit_log(guarded, job):
    before = len(guarded.events)
    _, lease = guarded.http("POST", ALLOCATE, {"poolName": "alices"}, bearer=job("alice"))
    guarded.http("POST", ALLOCATE, {"poolName": "alices"}, bearer=job("mallory"))
    guarded.release(lease).ok()

    def logged() -> list[dict[str, object]]:
        return guarded.events[before:]

    def released() -> list[object]:
        return [line["allocation"] for line in logged() if line["event"] == "lease.released"]

    # A thread of its own writes the log.
    lines = eventually(lambda: len(released()) and logged(), "the release is in the log")
    decisions = [line for line in lines if line["event"] == "audit.decision" and line["action"] == "allocate"]
    assert [(line["decision"], line["identity"]) for line in decisions] == [
        *(("allowed", "alice"), ("denied", "mallory"))
    ]
    claimed = next(line for line in lines if line["event"] == "lease.claimed")
    assert decisions[0]["allocation"] == claimed["allocation"]
    assert released() == [claimed["allocation"]]


def test_a_public_issuer_without_a_condition_is_not_trusted(guarded):
    def listed() -> dict[str, dict[str, object]]:
        status, body = guarded.http("GET", "/api/v1/issuers")
        assert status == 200
        return {f"{one['namespace']}/{one['name']}": one for one in body["issuers"]}

    eventually(lambda: listed()["buildkit-system/ci"]["ready"], "its keys were fetched")
    issuers = listed()
    assert issuers["buildkit-system/world"]["ready"] is False
    assert "condition" in issuers["buildkit-system/world"]["message"]
    assert issuers["buildkit-system/off"]["ready"] is False


@only_on("process", "keys are fetched without the backend")
def test_rotated_keys_are_fetched_and_an_unreachable_issuer_is_no_outage(guarded, issuer, job):
    issuer.rotate("key-2", keep=True)
    assert guarded.http("GET", "/api/v1/pools", bearer=job("bob"))[0] in {200, 401}
    eventually(lambda: guarded.http("GET", "/api/v1/pools", bearer=job("bob"))[0] == 200, "the new key is accepted")
    issuer.stop()
    try:
        assert guarded.http("GET", "/api/v1/pools", bearer=job("bob"))[0] == 200
    finally:
        issuer.start()


@only_on("process", "test_ci.py uses the API over TLS on every backend")
def test_the_api_works_over_tls(make_appliance, context):
    appliance = make_appliance()
    body = appliance.up_with({}, "--api-tls")
    assert body["apiEndpoint"].startswith("https://")
    appliance.cli("build", str(context.dockerfile("say over-tls"))).ok()
    port = appliance.ports["api"]
    other = {"BKCTL_ENDPOINT": f"https://localhost:{port}", "BKPOOL_HOME": str(appliance.base / "elsewhere")}
    token = (appliance.home / "admin.token").read_text().strip()
    refused = appliance.cli("status", **other, BKCTL_TOKEN=token)
    assert refused.code == 69, refused.text
    trusted = {**other, "BKCTL_TLS_CA_CERT": str(appliance.home / "pki" / "ca.crt")}
    appliance.cli("status", **trusted, BKCTL_TOKEN=token).ok()


@only_on("process", "options are checked before the backend is used")
def test_unsafe_addresses_beyond_this_machine_are_refused(make_appliance):
    appliance = make_appliance()
    beyond = ("--api-address", f"0.0.0.0:{free_port()}")
    for options in (beyond, (*beyond, "--dev-issuer", "--api-tls"), ("--dev-issuer", *beyond, "--plain-http")):
        answer = appliance.cli("up", "-d", *appliance.world.options(), *options)
        assert answer.code == 2, answer.text
        assert "--api-address" in answer.err
