"""What other rooms get from the settings: their own defaults, unless an operator says otherwise."""

import inspect
import re
from contextlib import AsyncExitStack
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from bkpool.allocation import wait_queue
from bkpool.api import ApiLimits, HttpLimits
from bkpool.appliance import backend, worker_network
from bkpool.appliance.backend import open_pod_backend, open_process_backend, open_replica_backend
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import Shutdown
from bkpool.appliance.tuning import (
    allowances,
    api_limits,
    failure_limits,
    gateway_limits,
    gateway_variables,
    gc_defaults,
    http_limits,
    kube_limits,
    leader_times,
    pod_deadlines,
    process_limits,
)
from bkpool.core.allowances import Allowed
from bkpool.core.names import Key
from bkpool.core.pool import CacheGC
from bkpool.core.reconcile.failures import FailureLimits
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.metrics import WORKER_SERIES
from bkpool.identity import issuer_keys, jwt, service_accounts, static_tokens
from bkpool.kube import ClusterAccess, KubeApi, KubeLimits
from bkpool.kube.leader import LeaderTimes
from bkpool.pki.bundle import ClusterSecrets
from bkpool.settings import Settings
from bkpool.settings.catalogue import all_settings
from bkpool.settings.kinds import COUNT, DURATION
from bkpool.telemetry.loop_watchdog import HEARTBEAT_TIMEOUT
from bkpool.workers.config import GC_DEFAULTS
from bkpool.workers.pods.pod_spec import PRIVILEGED_IMAGE, ROOTLESS_IMAGE
from bkpool.workers.pods.runtime import Deadlines
from bkpool.workers.processes.runtime import ProcessLimits
from bkpool.workers.processes.sandbox import Binaries

ROOT = Path(__file__).parents[2]
DEFAULT = Settings()
LIMITS = [one.field for one in all_settings().values() if one.section == "gateway" and one.kind in {COUNT, DURATION}]


def test_every_setting_is_read_by_some_room():
    code = "".join(path.read_text() for path in (ROOT / "bkpool").rglob("*.py") if path.parent.name != "settings")
    unread = [
        name for name, one in all_settings().items() if not re.search(rf'(?<!"{one.section})\.{one.field}\b', code)
    ]
    assert unread == [], "these settings have no effect"


def test_without_settings_each_room_gets_its_own_default():
    assert gateway_limits(DEFAULT) == GatewayLimits()
    assert failure_limits(DEFAULT) == FailureLimits()
    assert kube_limits(DEFAULT) == KubeLimits()
    assert api_limits(DEFAULT) == ApiLimits()
    assert http_limits(DEFAULT) == HttpLimits()
    assert gc_defaults(DEFAULT) == GC_DEFAULTS
    assert pod_deadlines(DEFAULT) == Deadlines()
    assert process_limits(DEFAULT) == ProcessLimits()
    timeout = inspect.signature(issuer_keys.IssuerKeys).parameters["timeout"].default
    for value, default in (
        (DEFAULT.identity.issuer_timeout.total_seconds(), timeout),
        (DEFAULT.identity.keys_fresh.total_seconds(), issuer_keys.FRESH_SECONDS),
        (DEFAULT.identity.keys_stale.total_seconds(), issuer_keys.STALE_SECONDS),
        (DEFAULT.identity.secret_fresh.total_seconds(), static_tokens.FRESH_SECONDS),
        (DEFAULT.identity.secret_timeout.total_seconds(), static_tokens.READ_TIMEOUT),
        (DEFAULT.identity.clock_leeway.total_seconds(), jwt.LEEWAY),
        (DEFAULT.metrics.worker_series, WORKER_SERIES),
        (DEFAULT.metrics.loop_timeout.total_seconds(), HEARTBEAT_TIMEOUT),
        (DEFAULT.identity.token_review_timeout.total_seconds(), service_accounts.REVIEW_TIMEOUT),
        (DEFAULT.allocation.max_waiters, wait_queue.MAX_WAITERS),
    ):
        assert value == default


@pytest.mark.parametrize("field", LIMITS)
def test_every_limit_of_the_gateway_reaches_it(field):
    one = all_settings()[f"gateway.{field}"]
    value = one.default + (timedelta(seconds=1) if one.kind is DURATION else 1)
    limits = gateway_limits(Settings.model_validate({"gateway": {field: value}}))
    assert getattr(limits, field) == (value.total_seconds() if one.kind is DURATION else value)


def test_every_limit_of_the_api_reaches_it():
    given = {"max_body": 70_000, "body_timeout": timedelta(seconds=5), "max_wait": timedelta(minutes=2)}
    limits = api_limits(Settings.model_validate({"api": given}))
    assert limits == ApiLimits(70_000, 5.0, timedelta(minutes=2))


@pytest.mark.parametrize("field", [field.name for field in fields(KubeLimits)])
def test_every_limit_of_the_client_of_kubernetes_reaches_it(field):
    value = all_settings()[f"kubernetes.{field}"].default + timedelta(seconds=1)
    limits = kube_limits(Settings.model_validate({"kubernetes": {field: value}}))
    assert getattr(limits, field) == value.total_seconds()


@pytest.mark.parametrize(
    "connect",
    [
        lambda stack, options: open_pod_backend(stack, options, options.access, None, lambda _: None),
        lambda stack, options: open_replica_backend(stack, options, "x"),
        lambda stack, options: GatewayReplica(options, Key("default", "p"))._start(stack, Shutdown()),
    ],
    ids=["host", "control replica", "gateway replica"],
)
async def test_every_process_waits_for_the_cluster_as_it_is_told(tmp_path, monkeypatch, connect):
    def connected(_access: ClusterAccess, limits: KubeLimits) -> None:
        raise InterruptedError(f"{limits.request_timeout:g} s")

    monkeypatch.setattr(KubeApi, "connect", connected)
    given = Settings.model_validate({"kubernetes": {"request_timeout": timedelta(seconds=42)}})
    async with AsyncExitStack() as stack:
        with pytest.raises(InterruptedError, match="42 s"):
            await connect(stack, RunOptions(home=tmp_path, cache=tmp_path, settings=given))


def test_the_election_has_the_times_of_its_lease():
    assert leader_times(DEFAULT) == LeaderTimes()
    minute = Settings.model_validate({"kubernetes": {"leader_lease": timedelta(minutes=1)}})
    assert leader_times(minute) == LeaderTimes.of(60)


WORKERS = {
    "gc_keep_storage": "8GB",
    "gc_reserved_space": "2GB",
    "gc_min_free_space": "10%",
    "gc_keep_duration": timedelta(hours=1),
    "start_timeout": timedelta(seconds=61),
    "concurrent_starts": 7,
    "adopt_timeout": timedelta(seconds=66),
    "stop_timeout": timedelta(seconds=67),
    "pod_scheduling_timeout": timedelta(seconds=62),
    "pod_pull_timeout": timedelta(seconds=63),
    "pod_creation_timeout": timedelta(seconds=64),
    "pod_deletion_timeout": timedelta(seconds=65),
}
COLLECTION = CacheGC(keep_storage="8GB", reserved_space="2GB", min_free_space="10%", keep_duration=timedelta(hours=1))


@pytest.fixture
def made(monkeypatch) -> dict[str, object]:
    """The options with which a runtime is made, which ends the opening of the backend."""
    options: dict[str, object] = {}

    def make(*_arguments: object, **given: object) -> None:
        options.update(given)
        raise InterruptedError

    monkeypatch.setattr(worker_network, "ProcessRuntime", make)
    monkeypatch.setattr(backend, "PodRuntime", make)
    return options


async def test_processes_are_run_as_the_settings_say(tmp_path, made):
    given = Settings.model_validate({"workers": WORKERS})
    options = RunOptions(home=tmp_path, cache=tmp_path, settings=given)
    binaries = Binaries(Path("buildkitd"), Path("runc"))
    async with AsyncExitStack() as stack:
        with pytest.raises(InterruptedError):
            await open_process_backend(stack, options, binaries, lambda _: None)
    limits = ProcessLimits(concurrent_starts=7, start_timeout=61, adopt_timeout=66, stop_timeout=67)
    assert (made["limits"], made["gc_defaults"]) == (limits, COLLECTION)
    assert made["network"] is not None


@pytest.mark.parametrize("enabled", [False, True])
async def test_the_port_of_the_development_issuer_is_taken_only_while_it_runs(tmp_path, made, enabled):
    given = Settings.model_validate({"dev_issuer": {"enabled": enabled, "address": ("127.0.0.1", 18888)}})
    options = RunOptions(home=tmp_path, cache=tmp_path, settings=given)
    with pytest.raises(InterruptedError):
        await worker_network.open_process_workers(options, Binaries(Path("buildkitd"), Path("runc")), {})
    assert (18888 in made["own_ports"]()) is enabled


async def test_pods_are_run_as_the_settings_say(tmp_path, made, monkeypatch):
    async def connected(*_arguments: object) -> SimpleNamespace:
        return SimpleNamespace(close=closed)

    async def closed() -> None:
        pass

    async def authorities(*_arguments: object) -> ClusterSecrets:
        return ClusterSecrets.create(datetime.now(UTC))

    monkeypatch.setattr(KubeApi, "connect", connected)
    monkeypatch.setattr(backend.kube_secrets, "load_or_create_authorities", authorities)
    given = Settings.model_validate({"workers": WORKERS})
    async with AsyncExitStack() as stack:
        with pytest.raises(InterruptedError):
            await open_replica_backend(stack, RunOptions(home=tmp_path, cache=tmp_path, settings=given), "x")
    assert made["gc_defaults"] == COLLECTION
    assert made["deadlines"] == Deadlines(scheduling=62, pulling=63, creating=64, answering=61, ending=65)


def test_gateways_in_a_cluster_get_only_the_limits_that_differ():
    assert gateway_variables(DEFAULT) == {}
    changed = Settings.model_validate({"gateway": {"first_wait": timedelta(seconds=3), "hosts": ("a",)}})
    assert gateway_variables(changed) == {"BKPOOL_GATEWAY_FIRST_WAIT": "3s"}


def test_gateways_in_a_cluster_get_the_times_of_the_cluster_but_not_those_of_the_election():
    of_cluster = {field: timedelta(seconds=80) for field in ("watch_silence", "leader_lease")}
    changed = Settings.model_validate({"kubernetes": {**of_cluster, "namespace": "elsewhere"}})
    assert gateway_variables(changed) == {"BKPOOL_KUBERNETES_WATCH_SILENCE": "1m20s"}


def test_gateways_in_a_cluster_count_as_this_process_does():
    changed = Settings.model_validate({"metrics": {"worker_series": 7, "address": ("0.0.0.0", 1)}})
    assert gateway_variables(changed) == {"BKPOOL_METRICS_WORKER_SERIES": "7"}


async def test_the_namespace_that_bkpool_makes_takes_no_pods_with_rights():
    made = []

    async def create(path: str, body: dict) -> None:
        made.append((path, body))

    await backend._ensure_namespace(SimpleNamespace(create=create), "buildkit-system")
    ((path, body),) = made
    assert path == "/api/v1/namespaces"
    assert body["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_what_the_operator_allows_reaches_the_policy():
    given = {
        "hosts": [Allowed("a", "b.example.com")],
        "privileged": ["a"],
        "images": [Allowed("a", "x/*")],
        "load_balancers": ["b"],
        "annotations": ["c"],
    }
    found = allowances(Settings.model_validate({"allow": given, "workers": {"buildkit_image": "mine:1"}}))
    assert found.hosts == {("a", "b.example.com")}
    assert found.images == (("a", "x/*"),)
    assert (found.privileged, found.load_balancers, found.service_annotations) == ({"a"}, {"b"}, {"c"})
    assert {"mine:1", ROOTLESS_IMAGE, PRIVILEGED_IMAGE} < found.own_images
