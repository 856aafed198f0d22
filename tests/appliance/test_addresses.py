"""Where callers reach the gateway, by the settings."""

import pytest

from bkpool.appliance.addresses import gateway_hosts
from bkpool.appliance.run_options import RunOptions
from bkpool.settings import Settings
from bkpool.settings.kinds import Address


@pytest.mark.parametrize(
    ("hosts", "address", "expected"),
    [
        ((), None, ()),
        ((), "127.0.0.1", ()),
        ((), "0.0.0.0", ()),
        ((), "::", ()),
        ((), "localhost", ()),
        ((), "127.0.0.5", ("127.0.0.5",)),
        ((), "::1", ("::1",)),
        ((), "fe80::1%eth0", ()),
        (("builds.example",), "127.0.0.5", ("builds.example",)),
    ],
)
def test_an_address_that_localhost_does_not_lead_to_is_named(tmp_path, hosts, address, expected):
    settings = Settings()
    gateway = settings.gateway.model_copy(
        update={"hosts": hosts, "address": Address(address, 1235) if address else None}
    )
    options = RunOptions(
        home=tmp_path, cache=tmp_path, backend="process", settings=settings.model_copy(update={"gateway": gateway})
    )
    assert gateway_hosts(options) == expected
