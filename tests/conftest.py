from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from bkpool.toolchain import Tool, Toolchain, default_cache
from support import captured_logs
from support.environment import forget_settings
from support.examples import examples
from support.issuer import Issuer
from support.secrets import secrets_in

forget_settings()

# How long one example takes says something about the machine, not about the code.
settings.register_profile(
    "bkpool",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=examples(100),
)
settings.load_profile("bkpool")


REAL_PROGRAMS = {"buildkitd", "buildctl", "buildx", "runc", "rootlesskit"}
"""Fixtures of tests that start programs of others."""
OWN_PROGRAM = {"bkpool", "started", "on_terminal"}
"""Fixtures of tests that start bkpool in a process of its own (tests/cli/conftest.py)."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that start programs as slow.

    Those with programs of others say nothing about the version of Python, except starts and stops of buildkitd.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & (REAL_PROGRAMS | OWN_PROGRAM):
            item.add_marker(pytest.mark.slow)
        if fixtures & REAL_PROGRAMS and item.path.parts[-2:] != ("workers", "test_process.py"):
            item.add_marker(pytest.mark.any_python)


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """The real tools, as bkpool itself finds or downloads them."""
    return Toolchain(default_cache())


@pytest.fixture(scope="session")
def buildkitd(toolchain: Toolchain) -> Path:
    return toolchain.ensure(Tool.BUILDKITD)


@pytest.fixture(scope="session")
def buildctl(toolchain: Toolchain) -> Path:
    return toolchain.ensure(Tool.BUILDCTL)


@pytest.fixture(scope="session")
def buildx(toolchain: Toolchain) -> Path:
    return toolchain.ensure(Tool.BUILDX)


@pytest.fixture(scope="session")
def runc(toolchain: Toolchain) -> Path:
    return toolchain.ensure(Tool.RUNC)


@pytest.fixture(scope="session")
def rootlesskit(toolchain: Toolchain) -> Path:
    return toolchain.ensure(Tool.ROOTLESSKIT)


@pytest.fixture(scope="session")
def issuer_server() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def issuer(issuer_server: Issuer) -> Issuer:
    """A real issuer in its initial state."""
    issuer_server.reset()
    return issuer_server


_logged: list[str] = []
"""The log lines that contained a secret."""


def _remember(_logger: object, _method: str, event: dict[str, object]) -> dict[str, object]:
    _logged.extend(f"{event.get('event')}: {found}" for found in secrets_in(repr(event)))
    return event


structlog.configure(processors=[_remember, *structlog.get_config()["processors"]])


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that runs within this process configures the log, for a stderr that ends with the test."""
    configuration = structlog.get_config()
    captured_logs.begin_test()
    yield
    if structlog.get_config()["cache_logger_on_first_use"] != configuration["cache_logger_on_first_use"]:
        captured_logs.forget_cached_loggers()
    structlog.configure(**configuration)


@pytest.fixture(autouse=True)
def _no_secret_was_logged() -> Iterator[None]:
    yield
    found = _logged.copy()
    _logged.clear()
    assert not found, found
