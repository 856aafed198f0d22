"""The tests of this folder need pytest-kind's plugin, which only `nox -s kind` loads."""

from __future__ import annotations

import pytest

PLUGIN = "pytest_kind.plugin"


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Ignores this folder without the plugin, because its options name the kind program and the cluster."""
    return None if config.pluginmanager.hasplugin(PLUGIN) else True
