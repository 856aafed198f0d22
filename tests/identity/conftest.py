from __future__ import annotations

import pytest

from support.issuer import Issuer


@pytest.fixture(scope="session")
def server():
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def issuer(server):
    """A real issuer in its initial state."""
    server.reset()
    return server
