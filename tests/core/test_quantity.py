from __future__ import annotations

from fractions import Fraction

import pytest

from bkpool.core.quantity import amount


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (2, 2),
        ("2", 2),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        ("1k", 1000),
        ("4Gi", 4 << 30),
        ("0.5Mi", 1 << 19),
        ("3e2", 300),
        ("2E", 2 * 10**18),
        ("5u", Fraction(5, 10**6)),
    ],
)
def test_an_amount_has_the_value_that_kubernetes_gives_it(text, value):
    assert amount(text) == value


def test_what_is_no_amount_is_refused():
    with pytest.raises(ValueError, match="not an amount"):
        amount("much")
