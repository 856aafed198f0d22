"""This folder needs pytest-kind's plugin, which is loaded by its own run only: `nox -s kind`."""

from __future__ import annotations

import pytest

PLUGIN = "pytest_kind.plugin"


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without the plugin there are no options that name its kind and its cluster."""
    return None if config.pluginmanager.hasplugin(PLUGIN) else True
