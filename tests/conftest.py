from __future__ import annotations

from pathlib import Path

import pytest

from bkpool.toolchain import Tool, Toolchain, default_cache


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """The real tools, as bkpool itself finds or gets them."""
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
