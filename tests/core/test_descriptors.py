"""How descriptors are shared: no server takes those of another, nor those that are reserved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.descriptors import ConnectionShares, share_descriptors

DEFAULT = ConnectionShares(api=4096, gateway_pending=1024, gateway=10_000)


@pytest.mark.parametrize(
    ("limit", "shares"),
    [
        (1 << 20, DEFAULT),
        (65_536, DEFAULT),
        (20_000, ConnectionShares(3976, 1024, 5452)),
        (4096, ConnectionShares(768, 768, 768)),
        (1024, ConnectionShares(192, 192, 192)),
        (256, ConnectionShares(48, 48, 48)),
        (64, ConnectionShares(16, 16, 16)),
    ],
)
def test_the_shares_of_the_defaults(limit, shares):
    assert share_descriptors(limit, DEFAULT) == shares


def test_a_server_that_does_not_run_leaves_its_part_to_the_others():
    assert share_descriptors(4096, ConnectionShares(api=4096)) == ConnectionShares(api=768)
    assert share_descriptors(4096, ConnectionShares(gateway_pending=100, gateway=9999)) == ConnectionShares(
        gateway_pending=100, gateway=1486
    )


WANTED = st.integers(0, 100_000)


@given(st.integers(256, 1 << 20), st.builds(ConnectionShares, WANTED, WANTED, WANTED))
def test_all_shares_together_leave_what_is_reserved(limit, wanted):
    shares = share_descriptors(limit, wanted)
    assert shares.api + shares.gateway_pending + 2 * shares.gateway <= limit - min(4096, limit // 4)
    assert shares.api <= wanted.api
    assert shares.gateway_pending <= wanted.gateway_pending
    assert shares.gateway <= wanted.gateway
    assert share_descriptors(limit, shares) == shares
