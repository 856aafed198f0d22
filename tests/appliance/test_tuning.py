"""What other rooms get from the settings: their own defaults, unless an operator says otherwise."""

import inspect
from contextlib import AsyncExitStack
from dataclasses import fields
from datetime import timedelta

import pytest

from bkpool.allocation import wait_queue
from bkpool.api import ApiLimits
from bkpool.appliance.backend import open_pod_backend, open_replica_backend
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.settings import Settings
from bkpool.appliance.shutdown import Shutdown
from bkpool.appliance.tuning import (
    api_limits,
    failure_limits,
    gateway_limits,
    gateway_variables,
    kube_limits,
    leader_times,
)
from bkpool.core.names import Key
from bkpool.core.reconcile.failures import FailureLimits
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.identity import issuer_keys, service_accounts, static_tokens
from bkpool.kube import ClusterAccess, KubeApi, KubeLimits
from bkpool.kube.leader import LeaderTimes
from bkpool.settings import Configuration
from bkpool.settings.catalogue import settings
from bkpool.settings.kinds import COUNT, DURATION

DEFAULT = Configuration()
LIMITS = [one.field for one in settings().values() if one.section == "gateway" and one.kind in {COUNT, DURATION}]


def test_without_settings_each_room_gets_its_own_default():
    assert gateway_limits(DEFAULT) == GatewayLimits()
    assert failure_limits(DEFAULT) == FailureLimits()
    assert kube_limits(DEFAULT) == KubeLimits()
    assert api_limits(DEFAULT) == ApiLimits()
    timeout = inspect.signature(issuer_keys.IssuerKeys).parameters["timeout"].default
    for value, default in (
        (DEFAULT.identity.issuer_timeout.total_seconds(), timeout),
        (DEFAULT.identity.keys_fresh.total_seconds(), issuer_keys.FRESH_SECONDS),
        (DEFAULT.identity.keys_stale.total_seconds(), issuer_keys.STALE_SECONDS),
        (DEFAULT.identity.secret_fresh.total_seconds(), static_tokens.FRESH_SECONDS),
        (DEFAULT.identity.token_review_timeout.total_seconds(), service_accounts.REVIEW_TIMEOUT),
        (DEFAULT.allocation.max_waiters, wait_queue.MAX_WAITERS),
    ):
        assert value == default


@pytest.mark.parametrize("field", LIMITS)
def test_every_limit_of_the_gateway_reaches_it(field):
    one = settings()[f"gateway.{field}"]
    value = one.default + (timedelta(seconds=1) if one.kind is DURATION else 1)
    limits = gateway_limits(Configuration.model_validate({"gateway": {field: value}}))
    assert getattr(limits, field) == (value.total_seconds() if one.kind is DURATION else value)


def test_every_limit_of_the_api_reaches_it():
    given = {"max_body": 70_000, "body_timeout": timedelta(seconds=5), "max_wait": timedelta(minutes=2)}
    limits = api_limits(Configuration.model_validate({"api": given}))
    assert limits == ApiLimits(70_000, 5.0, timedelta(minutes=2))


@pytest.mark.parametrize("field", [field.name for field in fields(KubeLimits)])
def test_every_limit_of_the_client_of_kubernetes_reaches_it(field):
    value = settings()[f"kubernetes.{field}"].default + timedelta(seconds=1)
    limits = kube_limits(Configuration.model_validate({"kubernetes": {field: value}}))
    assert getattr(limits, field) == value.total_seconds()


@pytest.mark.parametrize(
    "connect",
    [
        lambda stack, settings: open_pod_backend(stack, settings, settings.access, None, lambda _: None),
        lambda stack, settings: open_replica_backend(stack, settings, "x"),
        lambda stack, settings: GatewayReplica(settings, Key("default", "p"))._start(stack, Shutdown()),
    ],
    ids=["host", "control replica", "gateway replica"],
)
async def test_every_process_waits_for_the_cluster_as_it_is_told(tmp_path, monkeypatch, connect):
    def connected(_access: ClusterAccess, limits: KubeLimits) -> None:
        raise InterruptedError(f"{limits.request_timeout:g} s")

    monkeypatch.setattr(KubeApi, "connect", connected)
    configuration = Configuration.model_validate({"kubernetes": {"request_timeout": timedelta(seconds=42)}})
    async with AsyncExitStack() as stack:
        with pytest.raises(InterruptedError, match="42 s"):
            await connect(stack, Settings(home=tmp_path, cache=tmp_path, configuration=configuration))


def test_the_election_has_the_times_of_its_lease():
    assert leader_times(DEFAULT) == LeaderTimes()
    minute = Configuration.model_validate({"kubernetes": {"leader_lease": timedelta(minutes=1)}})
    assert leader_times(minute) == LeaderTimes.of(60)


def test_gateways_in_a_cluster_get_only_the_limits_that_differ():
    assert gateway_variables(DEFAULT) == {}
    changed = Configuration.model_validate({"gateway": {"first_wait": timedelta(seconds=3), "hosts": ("a",)}})
    assert gateway_variables(changed) == {"BKPOOL_GATEWAY_FIRST_WAIT": "3s"}


def test_gateways_in_a_cluster_get_the_times_of_the_cluster_but_not_those_of_the_election():
    of_cluster = {field: timedelta(seconds=80) for field in ("watch_silence", "leader_lease")}
    changed = Configuration.model_validate({"kubernetes": {**of_cluster, "namespace": "elsewhere"}})
    assert gateway_variables(changed) == {"BKPOOL_KUBERNETES_WATCH_SILENCE": "1m20s"}
