"""`renew` with the lease's token alone asks today's rules about the caller who made the lease.

The attack is the same everywhere: somebody still has the token of a lease and renews it, although their access was
taken away. The API, the rules and the methods are real: token files, issuers on HTTP, objects in the store.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Conflict
from bkpool.core.names import Key
from bkpool.core.worker import Worker
from bkpool.home.files import write_private
from bkpool.identity import Identity
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.oidc import OidcAuthenticator, trusted_issuers
from bkpool.identity.remembering import LONGEST
from bkpool.identity.static_tokens import FileTokenReader
from support.api import ALLOCATE, running_api
from support.captured_logs import capture_logs
from support.issuer import AUDIENCE

RENEW = "/api/v1/workers/renew"
SYSTEM = "buildkit-system"
ALICE, BOB = "alice-has-this-token", "bob-has-this-other-token"
POOL = Key("default", "p")


@pytest.fixture
async def api(tmp_path):
    keys = IssuerKeys(clock=time.monotonic, timeout=60)

    def oidc(mirror):
        trusted = lambda: trusted_issuers(mirror.configs.values(), mirror.pools.values(), SYSTEM)  # noqa: E731
        return (OidcAuthenticator(keys, trusted, lambda: datetime.now(UTC)),)

    async with running_api(tmp_path, reader=FileTokenReader(), make_authenticators=oidc) as api:
        yield api
    await keys.close()


async def lease_of(api, bearer):
    status, lease, _ = await api("POST", ALLOCATE, {"poolName": "p"}, bearer=bearer)
    assert status == 200, lease
    return lease


async def renew(api, lease, **more):
    """With the lease's token and nothing else."""
    status, answer, _ = await api("POST", RENEW, {"token": lease["token"], **more}, headers={})
    return status, answer.get("error", answer)


async def refused(api, lease, reason):
    status, error = await renew(api, lease)
    assert (status, error["code"]) == (403, "NotRenewable"), error
    assert reason in error["message"]
    assert error["message"].startswith("this lease cannot be renewed: the caller who made it may not use pool")


# --- fixed tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def token_file(api, tmp_path):
    """The file of pool p, which alice and bob have a token in."""
    path = tmp_path / "tokens.yaml"
    write(path, alice=ALICE, bob=BOB)
    await api.world.pool(auth={"methods": [{"type": "token", "token": {"file": str(path)}}]}, scaling={"max": 4})
    return path


def write(path, **entries):
    path.unlink(missing_ok=True)
    write_private(path, yaml.safe_dump(entries).encode())


async def test_a_user_taken_out_of_the_token_file_renews_no_more(api, token_file):
    alices, bobs = await lease_of(api, ALICE), await lease_of(api, BOB)
    assert (await renew(api, alices))[0] == 200
    write(token_file, bob=BOB)
    with capture_logs() as lines:
        await refused(api, alices, "the caller has no token of the pool any more")
    (line,) = [line for line in lines if line["event"] == "audit.decision"]
    assert (line["action"], line["decision"], line["identity"]) == ("renew", "denied", "alice")
    assert line["worker"] == f"default/{alices['workerName']}"
    assert (await renew(api, bobs))[0] == 200
    assert (await api("POST", "/api/v1/workers/lookup", {"token": alices["token"]}, headers={}))[0] == 200, (
        "the lease runs to its end"
    )
    write(token_file, alice={"token": "another-token-for-alice"}, bob=BOB)
    assert (await renew(api, alices))[0] == 200, "a user with a new token is the same user"
    write(token_file, alice={"token": ALICE, "pools": ["other"]})
    await refused(api, alices, "this token of alice is not for pool default/p")


async def test_tokens_that_cannot_be_read_renew_nothing_and_it_is_said_that_this_may_pass(api, token_file):
    lease = await lease_of(api, ALICE)
    token_file.unlink()
    status, error = await renew(api, lease)
    assert (status, error["code"]) == (503, "Unavailable")
    write(token_file, alice=ALICE)
    assert (await renew(api, lease))[0] == 200


async def test_a_pool_without_its_method_or_with_another_rule_renews_no_more(api, token_file):
    method = {"type": "token", "token": {"file": str(token_file)}}
    lease = await lease_of(api, ALICE)
    await api.world.change_spec(auth={"methods": [method], "rbac": {"rules": [{"users": ["bob"]}]}})
    await refused(api, lease, "no rule in spec.auth.rbac.rules of the pool names this caller")
    await api.world.change_spec(auth={"methods": [method], "rbac": {"rules": [{"users": ["al*"]}]}})
    assert (await renew(api, lease))[0] == 200
    await api.world.change_spec(auth={"methods": ["mtls"], "rbac": {"rules": [{"users": ["al*"]}]}})
    await refused(api, lease, "the caller has no token of the pool any more")


# --- OIDC -----------------------------------------------------------------------------------------------------------

JOB = {"sub": "repo:acme/app", "repository": "acme/app", "ref": "refs/heads/main", "teams": ["dev", "ops"]}


async def configure(api, issuer, name="ci", **spec):
    """Creates or replaces a BuildKitOIDCConfig."""
    world, key = api.world, Key(SYSTEM, name)
    conditions = [{"claim": "repository", "values": ["acme/app"]}]
    whole = {"issuer": issuer.url, "audience": AUDIENCE, "pools": ["p"], "conditions": conditions, **spec}
    document = OIDCConfig.model_validate({"metadata": {"name": name, "namespace": SYSTEM}, "spec": whole})
    before = world.replicas[0].mirror.configs.get(key)
    if before is None:
        await world.store.create(document)
    else:
        await world.store.replace(before.but(spec=document.spec))
    configs = world.replicas[0].mirror.configs
    await world.until(lambda: key in configs and configs[key].spec == document.spec)


@pytest.fixture
async def job(api, issuer):
    """A lease that a CI job made with its ID token."""
    await configure(api, issuer)
    await api.world.pool(scaling={"max": 4})
    return await lease_of(api, issuer.token(**JOB))


async def test_an_issuer_that_is_down_is_not_asked(api, issuer, job):
    issuer.requests.clear()
    issuer.hang("/jwks")
    assert (await renew(api, job))[0] == 200
    assert issuer.requests == []


async def test_a_deleted_or_disabled_configuration_renews_nothing(api, issuer, job):
    await configure(api, issuer, enabled=False)
    await refused(api, job, "is not configured here any more")
    await configure(api, issuer)
    assert (await renew(api, job))[0] == 200
    world = api.world
    await world.store.delete(OIDCConfig, SYSTEM, "ci")
    await world.until(lambda: not world.replicas[0].mirror.configs)
    await refused(api, job, "is not configured here any more")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"conditions": [{"claim": "repository", "values": ["acme/other"]}]},
            "claim repository is 'acme/app'; conditions require 'acme/other'",
        ),
        ({"conditions": [{"claim": "ref", "values": ["refs/heads/main"]}]}, "claim ref is missing"),
        ({"audience": "another"}, f"aud is '{AUDIENCE}', not 'another'"),
        ({"claimsMapping": {"user": "actor"}}, "claim actor (claimsMapping.user) is missing"),
        ({"pools": ["other"]}, "the pool has no rule"),
    ],
)
async def test_a_configuration_that_became_stricter_renews_no_more(api, issuer, job, change, reason):
    """A claim that nothing named when the lease was made is not remembered, so it does not meet a new condition."""
    await configure(api, issuer, **change)
    await refused(api, job, reason)
    await configure(api, issuer, name="second", pools=["p"])
    assert (await renew(api, job))[0] == 200, "another configuration of the issuer lets the caller in"


async def test_rules_about_groups_count_as_they_are_today(api, issuer):
    await configure(api, issuer, claimsMapping={"groups": "teams"})
    await api.world.pool(auth={"rbac": {"rules": [{"users": ["group:dev"]}]}})
    lease = await lease_of(api, issuer.token(**JOB))
    await api.world.change_spec(auth={"rbac": {"rules": [{"users": ["group:ops"]}]}})
    assert (await renew(api, lease))[0] == 200
    await api.world.change_spec(auth={"rbac": {"rules": [{"users": ["group:admins"]}]}})
    await refused(api, lease, "no rule in spec.auth.rbac.rules of the pool names this caller")


async def test_only_named_claims_are_remembered_and_no_part_of_the_token(api, issuer):
    conditions = [{"claim": "repository", "patterns": ["acme/*"]}, {"claim": "deep.inside", "values": [7]}]
    await configure(api, issuer, conditions=conditions)
    await api.world.pool()
    token = issuer.token(**JOB, deep={"inside": 7, "secret": "s3cr3t"}, email="ann@example.com")
    lease = await lease_of(api, token)
    (worker,) = api.world.held()
    caller = worker.held_lease.caller
    assert (caller.method, caller.issuer, caller.user) == ("oidc", issuer.url, "repo:acme/app")
    assert caller.claims == (f'{{"aud":"{AUDIENCE}","deep.inside":7,"repository":"acme/app","sub":"repo:acme/app"}}')
    stored = worker.model_dump_json()
    for secret in ("s3cr3t", "ann@example.com", "refs/heads/main", *token.split(".")):
        assert secret not in stored
    assert (await renew(api, lease))[0] == 200


async def test_a_caller_who_is_too_large_to_be_remembered_renews_with_their_own_token(api, issuer):
    await configure(api, issuer, claimsMapping={"groups": "teams"})
    await api.world.pool()
    token = issuer.token(**{**JOB, "teams": [f"team-{n:04}-of-the-large-company" for n in range(200)]})
    lease = await lease_of(api, token)
    (worker,) = api.world.held()
    caller = worker.held_lease.caller
    assert (caller.user, caller.complete, caller.claims) == ("repo:acme/app", False, "")
    assert len(caller.model_dump_json(by_alias=True)) < LONGEST
    await refused(api, lease, "more than 4096 bytes")
    own = {"workerName": lease["workerName"]}
    assert (await api("POST", RENEW, own, bearer=token))[0] == 200
    await configure(api, issuer, claimsMapping={"groups": "teams"}, pools=["other"])
    assert (await api("POST", RENEW, own, bearer=token))[0] == 403
    assert (await api("POST", RENEW, own))[0] == 200, "the admin may renew every lease"


# --- leases without what is remembered, and what is as before -------------------------------------------------------


async def test_a_lease_of_an_earlier_version_is_judged_by_the_name_alone(api):
    await api.world.pool(auth={"rbac": {"rules": [{"users": ["ann", "group:dev"]}]}}, scaling={"max": 4})
    api.authenticator.known["ann"] = (Identity("ann", authority="https://issuer"),)
    lease, admins = await lease_of(api, "ann"), await lease_of(api, "a" * 43)
    await forget_callers(api)
    assert (await renew(api, lease))[0] == 200
    await api.world.change_spec(auth={"rbac": {"rules": [{"users": ["group:dev"]}]}})
    await refused(api, lease, "no rule in spec.auth.rbac.rules of the pool names this caller")
    assert (await renew(api, admins))[0] == 200
    await api.world.change_spec()
    assert (await renew(api, lease))[0] == 200, "no rule decides by name"


async def forget_callers(api):
    """Takes from all leases what is remembered of their callers. The mark of a delivered answer may come between."""
    store = api.world.store
    while left := [worker for worker in (await store.list(Worker)).items if worker.held_lease.caller is not None]:
        for worker in left:
            with suppress(Conflict):
                await store.replace(worker.with_lease(worker.held_lease.but(caller=None)))


async def test_the_admins_lease_is_renewed_and_todays_limits_of_the_pool_count(api):
    await api.world.pool(gateway={"maxTokenTTL": "8h"})
    lease = await lease_of(api, "a" * 43)
    assert (await renew(api, lease, ttl="7h"))[0] == 200
    await api.world.change_spec(gateway={"maxTokenTTL": "2h"})
    status, error = await renew(api, lease, ttl="7h")
    assert (status, error["field"]) == (400, "ttl")
    allocated_at = api.world.held()[0].held_lease.allocated_at
    assert (await renew(api, lease, ttl="2h"))[0] == 200
    assert api.world.held()[0].held_lease.expires_at <= allocated_at + timedelta(hours=2)
    await api("POST", "/api/v1/workers/release", {"token": lease["token"]}, headers={})
    assert (await renew(api, lease))[0] == 410
