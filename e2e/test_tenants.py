"""Two tenants of one pool: neither can find what the other has built, mounted or printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count

import pytest

from harness import Appliance, Certificates, Context, eventually, oidc_config, only_on, pool, really_ran, run
from support.issuer import AUDIENCE, Issuer

_NUMBER = count()
ANNS, BOBS = "of-ann-7d1c", "of-bob-52ae"
POOLS = {
    "one": {"scaling": {"max": 1}},
    "two": {"scaling": {"max": 2}},
    "never": {"scaling": {"max": 1}, "cache": {"reuse": "never"}},
    "gone": {"scaling": {"max": 1, "scaleDownDelay": "0s"}, "cache": {"reuse": "never"}},
    "guarded": {"scaling": {"max": 2}, "untrusted": True},
    "shared": {"scaling": {"max": 1}, "cache": {"reuse": "pool", "backends": [{"type": "local"}]}},
    "open": {"scaling": {"max": 1}, "cache": {"reuse": "pool", "keepHistory": True}},
}


@pytest.fixture(scope="module")
def appliance(tmp_path_factory, tools, world, issuer) -> Iterator[Appliance]:
    """An appliance with one issuer, whose tokens grant all pools."""
    appliance = Appliance(tmp_path_factory.mktemp("tenants"), tools, world=world)
    believed = {"issuer": issuer.url, "audience": AUDIENCE, "claimsMapping": {"user": "actor"}, "pools": ["*"]}
    appliance.up_from([oidc_config("ci", **believed), *(pool(name, **spec) for name, spec in POOLS.items())])
    yield appliance
    appliance.finish()


class Tenant:
    """A user of the pools who leaves a marker in all builds."""

    def __init__(self, appliance: Appliance, issuer: Issuer, name: str, marker: str) -> None:
        self.appliance, self.name, self.marker = appliance, name, marker
        self.bearer = issuer.token(actor=name)

    def allocate(self, pool: str, *options: str) -> Certificates:
        answer = self.appliance.cli("allocate", "--pool", pool, *options, BKCTL_TOKEN=self.bearer).ok()
        return Certificates.of(answer.json, self.appliance.base / f"{self.name}-{next(_NUMBER)}")

    def builder(self, certificates: Certificates) -> str:
        return self.appliance.builder(certificates, f"{self.name}-{next(_NUMBER)}")

    def build(self, certificates: Certificates, context: Context):
        """Leaves the marker in a cache mount, a secret and a layer, and in the log of buildkitd by a failing step."""
        secret = context.path.parent / "secret"
        secret.write_text(self.marker)
        lines = [
            "FROM scratch",
            "COPY program /program",
            _run("append", "/cache/file", self.marker, mount="type=cache,target=/cache"),
            _run("say", "the-same-for-all", mount="type=secret,id=s"),
            _run("write", "/layer", self.marker),
            _run("sleep", self.marker),
        ]
        context.write("\n".join(lines))
        answer = self.appliance.build(self.builder(certificates), context.path, "--secret", f"id=s,src={secret}")
        assert f'"/program sleep {self.marker}" did not complete' in answer.text
        return answer

    def release(self, certificates: Certificates) -> None:
        self.appliance.release(certificates.lease).ok()


def _run(*words, mount=""):
    return f"RUN {f'--mount={mount} ' if mount else ''}{json.dumps(['/program', *words])}"


@pytest.fixture
def ann(appliance, issuer) -> Tenant:
    return Tenant(appliance, issuer, "ann", ANNS)


@pytest.fixture
def bob(appliance, issuer) -> Tenant:
    return Tenant(appliance, issuer, "bob", BOBS)


@pytest.fixture
def found(appliance):
    """Returns a function that lists the files of the home that contain a text."""

    def look(marker: str) -> list[str]:
        inside = [str(appliance.home / part) for part in ("slots", "logs")]
        return run("grep", "-rlaF", "--", marker, *inside, env=appliance.env).out.splitlines()

    return look


def output_of_buildctl(appliance, tools, certificates, *what):
    gateway = f"tcp://localhost:{appliance.ports['gateway']}"
    return run(tools["buildctl"], "--addr", gateway, *certificates.buildctl, *what, env=appliance.env).ok().out


def test_the_next_tenant_of_a_worker_finds_nothing_of_the_last_one(appliance, tools, ann, bob, context):
    anns = ann.allocate("one")
    first = ann.build(anns, context)
    assert cached_by(first) == [ANNS]
    assert really_ran(first, "the-same-for-all")
    assert ANNS in output_of_buildctl(appliance, tools, anns, "du", "--verbose")
    assert output_of_buildctl(appliance, tools, anns, "debug", "histories")
    ann.release(anns)

    bobs = bob.allocate("one")
    assert bobs.lease["workerName"] == anns.lease["workerName"]
    body = output_of_buildctl(appliance, tools, bobs, "du", "--verbose")
    assert ANNS not in body
    assert re.search(r"Total:\s+0B", body), body
    assert ANNS not in output_of_buildctl(appliance, tools, bobs, "debug", "histories")
    listed = appliance.buildx("history", "ls", "--builder", bob.builder(bobs)).ok().out.splitlines()
    assert len(listed) <= 1, listed
    second = bob.build(bobs, context)
    assert cached_by(second) == [BOBS]
    assert really_ran(second, "the-same-for-all")
    late = appliance.build(ann.builder(anns), context.dockerfile("say never"))
    assert "the lease was released" in late.text
    bob.release(bobs)


KEY = "of-ann-s3-key-91fe"
SHARED_STEP = f"FROM scratch\nCOPY program /program\n{_run('say', 'shared-step')}"


def build_with_a_key(tenant, builder, context) -> str:
    """A build with a key in a build argument and in its log; returns its reference, as a caller sees it."""
    context.write(f"{SHARED_STEP}\nARG KEY\n{_run('say', KEY)}")
    tenant.appliance.build(builder, context.path, "--build-arg", f"KEY={KEY}").ok()
    (line,) = tenant.appliance.buildx("history", "ls", "--builder", builder, "--format", "json").ok().out.splitlines()
    return json.loads(line)["ref"].rpartition("/")[2]


def shown_by_history(tenant, builder, ref) -> str:
    """Everything that `buildx history` shows of a build."""
    ways = (("ls", "--no-trunc"), ("inspect", ref), ("logs", ref))
    answers = [tenant.appliance.buildx("history", way, "--builder", builder, *options) for way, *options in ways]
    return "\n".join(answer.text for answer in answers)


def test_a_cache_of_the_pool_shows_nobody_the_history_of_the_caller_before(appliance, tools, ann, bob, context):
    anns = ann.allocate("shared")
    builder = ann.builder(anns)
    ref = build_with_a_key(ann, builder, context)
    assert KEY in shown_by_history(ann, builder, ref), "a caller sees their own history"
    ann.release(anns)

    bobs = bob.allocate("shared")
    assert bobs.lease["workerName"] == anns.lease["workerName"]
    builder = bob.builder(bobs)
    assert KEY not in output_of_buildctl(appliance, tools, bobs, "debug", "histories", "--format={{json .}}")
    assert KEY not in shown_by_history(bob, builder, ref)
    context.write(SHARED_STEP)
    assert not really_ran(appliance.build(builder, context.path).ok(), "shared-step"), "the cache is shared"

    for worker in appliance.workers():
        appliance.world.kill_worker(worker)
    appliance.build(builder, context.path).ok()  # the gateway holds the connection until the worker is back
    again = output_of_buildctl(appliance, tools, bobs, "debug", "histories", "--format={{json .}}")
    assert KEY not in again, "buildkitd only hides a build that somebody has asked for, until it starts again"
    bob.release(bobs)


def test_a_crash_after_a_release_shows_nobody_the_history_either(appliance, tools, ann, bob, context):
    anns = ann.allocate("shared")
    build_with_a_key(ann, ann.builder(anns), context)
    ann.release(anns)
    appliance.kill()  # before, while or after the history is cleared
    appliance.up()
    bobs = bob.allocate("shared")
    assert bobs.lease["workerName"] == anns.lease["workerName"]
    assert KEY not in output_of_buildctl(appliance, tools, bobs, "debug", "histories", "--format={{json .}}")
    bob.release(bobs)


def test_a_kept_history_is_shown_to_all_callers_of_the_pool(ann, bob, context):
    anns = ann.allocate("open")
    ref = build_with_a_key(ann, ann.builder(anns), context)
    ann.release(anns)
    bobs = bob.allocate("open")
    assert KEY in shown_by_history(bob, bob.builder(bobs), ref)
    bob.release(bobs)


def cached_by(answer):
    """Returns the markers in the cache mount."""
    (held,) = re.findall(r'cache holds: "(.*)"', answer.text)
    return [line for line in held.split("\\n") if line]


@only_on("process", "it reads this machine's disk")
def test_nothing_of_a_tenant_stays_on_disk_for_the_next(ann, bob, context, found):
    anns = ann.allocate("one")
    ann.build(anns, context)
    left = {"layer", "file", "default.one-worker-0.log"}
    eventually(lambda: {entry.rpartition("/")[2] for entry in found(ANNS)} >= left, "the marker is in each of them")
    ann.release(anns)
    bobs = bob.allocate("one")
    assert found(ANNS) == []
    bob.release(bobs)


@only_on("process", "it reads this machine's disk")
@pytest.mark.parametrize("pool", ["never", "gone", "guarded"])
def test_without_reuse_the_cache_is_wiped_before_the_next_tenant(ann, context, found, pool):
    anns = ann.allocate(pool)
    ann.build(anns, context)
    assert found(ANNS) != []
    ann.release(anns)
    eventually(lambda: found(ANNS) == [], "the data of the lease is wiped")


@pytest.mark.parametrize("pool", ["never", "guarded"])
def test_without_reuse_not_even_the_same_tenant_finds_anything(ann, context, pool):
    for _ in range(2):
        certificates = ann.allocate(pool)
        built = ann.build(certificates, context)
        assert cached_by(built) == [ANNS]
        assert really_ran(built, "the-same-for-all")
        ann.release(certificates)


def test_a_tenant_gets_their_cache_again_and_a_full_pool_wipes_the_least_recently_used(ann, bob, issuer, context):
    cyd = Tenant(ann.appliance, issuer, "cyd", "of-cyd-11b0")
    anns, bobs = ann.allocate("two"), bob.allocate("two")
    ann.build(anns, context)
    bob.build(bobs, context)
    for tenant, certificates in ((bob, bobs), (ann, anns)):
        tenant.release(certificates)
        eventually(lambda: ann.appliance.pool("two")["allocated"] < 2, "released")
    eventually(lambda: ann.appliance.pool("two")["allocated"] == 0, "both are released")

    again = ann.allocate("two")
    assert again.lease["workerName"] == anns.lease["workerName"]
    built = ann.build(again, context)
    assert not really_ran(built, "the-same-for-all")
    ann.release(again)
    eventually(lambda: ann.appliance.pool("two")["allocated"] == 0, "released")

    cyds = cyd.allocate("two")
    assert cyds.lease["workerName"] == bobs.lease["workerName"], "the cache of bob was used least recently"
    assert cached_by(cyd.build(cyds, context)) == [cyd.marker]
    still = ann.allocate("two")
    assert not really_ran(ann.build(still, context), "the-same-for-all"), "the cache of ann was not wiped"
    cyd.release(cyds)
    ann.release(still)


def test_a_tenant_cannot_use_the_lease_of_another(appliance, ann, bob):
    anns = ann.allocate("two", "--job-id", "job-1")
    bobs = bob.allocate("two", "--job-id", "job-1")
    assert bobs.lease["workerName"] != anns.lease["workerName"]
    assert bobs.lease["token"] != anns.lease["token"]
    named = {"workerName": anns.lease["workerName"], "namespace": "default"}
    for what in ("renew", "release"):
        status, body = appliance.http("POST", f"/api/v1/workers/{what}", named, bearer=bob.bearer)
        assert status in {403, 404}, body
        assert "ann" not in json.dumps(body)
    status, body = appliance.http("POST", "/api/v1/workers/lookup", {"token": "x" * 43}, bearer=bob.bearer)
    assert status == 404, body
    shown = json.dumps(appliance.http("GET", "/api/v1/pools/two", bearer=bob.bearer)[1])
    assert '"ann"' not in shown
    assert appliance.http("POST", "/api/v1/workers/lookup", {"token": anns.lease["token"]})[0] == 200
    ann.release(anns)
    bob.release(bobs)
