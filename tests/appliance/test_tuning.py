"""What other rooms get from the settings: their own defaults, unless an operator says otherwise."""

import inspect
from datetime import timedelta

import pytest

from bkpool.allocation import wait_queue
from bkpool.api import app
from bkpool.appliance.tuning import failure_limits, gateway_limits, gateway_variables
from bkpool.core.reconcile.failures import FailureLimits
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.identity import issuer_keys, service_accounts, static_tokens
from bkpool.settings import Configuration
from bkpool.settings.catalogue import settings
from bkpool.settings.kinds import COUNT, DURATION

DEFAULT = Configuration()
LIMITS = [one.field for one in settings().values() if one.section == "gateway" and one.kind in {COUNT, DURATION}]


def test_without_settings_each_room_gets_its_own_default():
    assert gateway_limits(DEFAULT) == GatewayLimits()
    assert failure_limits(DEFAULT) == FailureLimits()
    timeout = inspect.signature(issuer_keys.IssuerKeys).parameters["timeout"].default
    for value, default in (
        (DEFAULT.identity.issuer_timeout.total_seconds(), timeout),
        (DEFAULT.identity.keys_fresh.total_seconds(), issuer_keys.FRESH_SECONDS),
        (DEFAULT.identity.keys_stale.total_seconds(), issuer_keys.STALE_SECONDS),
        (DEFAULT.identity.secret_fresh.total_seconds(), static_tokens.FRESH_SECONDS),
        (DEFAULT.identity.token_review_timeout.total_seconds(), service_accounts.REVIEW_TIMEOUT),
        (DEFAULT.allocation.max_waiters, wait_queue.MAX_WAITERS),
        (DEFAULT.api.max_body, app.MAX_BODY),
    ):
        assert value == default


@pytest.mark.parametrize("field", LIMITS)
def test_every_limit_of_the_gateway_reaches_it(field):
    one = settings()[f"gateway.{field}"]
    value = one.default + (timedelta(seconds=1) if one.kind is DURATION else 1)
    limits = gateway_limits(Configuration.model_validate({"gateway": {field: value}}))
    assert getattr(limits, field) == (value.total_seconds() if one.kind is DURATION else value)


def test_gateways_in_a_cluster_get_only_the_limits_that_differ():
    assert gateway_variables(DEFAULT) == {}
    changed = Configuration.model_validate({"gateway": {"first_wait": timedelta(seconds=3), "hosts": ("a",)}})
    assert gateway_variables(changed) == {"BKPOOL_GATEWAY_FIRST_WAIT": "3s"}
