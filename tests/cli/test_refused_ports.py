"""The hint about ports of loopback, by what buildkitd really says."""

from __future__ import annotations

import pytest

from bkpool.cli.refused_ports import refused

REFUSED = "connect: connection refused"
HEAD = 'failed to do request: Head "http://localhost:5000/v2/x/manifests/latest": '


@pytest.mark.parametrize(
    ("record", "ports"),
    [
        (HEAD + "dial tcp 127.0.0.1:5000: connect: connection refused", [5000]),
        (HEAD + "dial tcp [::1]:5000: connect: connection refused", [5000]),
        (
            "dial tcp 127.0.1.1:80: connect: connection refused dial tcp [::1]:79: connect: connection refused",
            [79, 80],
        ),
        ("dial tcp 192.0.2.1:5000: connect: connection refused", []),
        ("dial tcp 127.0.0.1:5000: i/o timeout", []),
        ("", []),
    ],
)
def test_ports_of_loopback_that_refused_are_found(record, ports):
    assert refused(record) == ports
