"""Fixtures of the end-to-end tests.

The tests of a module share one appliance. A test that breaks it makes another.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bkpool.kind.engine import engine_fault
from bkpool.toolchain import Tool, Toolchain, default_cache
from harness import HERE, Appliance, Context, World, do_all, registry, unfinished
from kind_cluster import E2eCluster, Kubectl, e2e_cluster
from support.environment import forget_settings
from support.issuer import Issuer
from worlds import Pods, Processes

forget_settings()

BACKEND = os.environ.get("BKPOOL_E2E_BACKEND", "process")
"""The backend of the tests that are not marked for one."""

LIMIT = 900.0
"""Seconds after which a test and its fixtures have failed: they wait forever. A kind cluster needs minutes."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of another backend. Gives every test its limit."""
    for item in items:
        item.add_marker(pytest.mark.timeout(LIMIT))
    others = [item for item in items if (mark := item.get_closest_marker("only")) and mark.args[0] != BACKEND]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """A real issuer of the module."""
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="session")
def cluster() -> Iterator[E2eCluster]:
    """A kind cluster, if there is a container engine (kind_cluster.py)."""
    if fault := engine_fault():
        pytest.skip(fault)
    with e2e_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def kubectl(cluster: E2eCluster) -> Kubectl:
    return Kubectl(cluster.kubeconfig)


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> World:
    """The place where the workers run."""
    if BACKEND == "process":
        return Processes()
    return Pods(request.getfixturevalue("cluster"))


@pytest.fixture(scope="session")
def tools() -> dict[str, Path]:
    wanted = [Tool.BUILDKITD, Tool.BUILDCTL, Tool.BUILDX, Tool.RUNC, Tool.ROOTLESSKIT]
    return {str(tool): path for tool, path in Toolchain(default_cache()).ensure_all(wanted).items()}


def _go_build(directory: Path, package: str, target: Path) -> Path:
    """Builds a test program once into the cache. Its name contains a digest of its sources."""
    go = shutil.which("go")
    assert go, "the end-to-end tests build their registry and their test program with Go: install it"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            draft = target.with_suffix(".new")
            env = {**os.environ, "CGO_ENABLED": "0"}
            subprocess.run([go, "build", "-trimpath", "-o", str(draft), package], cwd=directory, env=env, check=True)
            draft.rename(target)
    return target


@pytest.fixture(scope="session")
def registry_program() -> Path:
    target = default_cache() / "e2e" / "registry-v3.1.2"
    return _go_build(HERE / "registry", "github.com/distribution/distribution/v3/cmd/registry", target)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _go_build(HERE / "program", ".", tmp_path_factory.mktemp("program") / "program")


@pytest.fixture(scope="session")
def registry_host(registry_program: Path, tmp_path_factory: pytest.TempPathFactory, world: World) -> Iterator[str]:
    with registry(registry_program, tmp_path_factory.mktemp("registry"), world.registry_address) as host:
        yield host


@pytest.fixture(scope="module", autouse=True)
def no_appliance_is_left() -> Iterator[None]:
    """Ends the appliances of fixtures that failed before their `yield`: they would disturb later modules."""
    yield
    do_all(*(appliance.finish for appliance in tuple(unfinished)))


@pytest.fixture
def context(tmp_path: Path, program: Path) -> Context:
    return Context(tmp_path / "context", program)


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, tools: dict[str, Path], world: World) -> Iterator[Appliance]:
    """An appliance with a warm worker, for tests that do not change it."""
    appliance = Appliance(tmp_path_factory.mktemp("appliance"), tools, world=world)
    appliance.up_with({"scaling": {"min": 1, "max": 4}})
    appliance.all_idle()
    yield appliance
    appliance.finish()


@pytest.fixture
def make_appliance(tmp_path: Path, tools: dict[str, Path], world: World) -> Iterator[Callable[[], Appliance]]:
    """Makes appliances that a test may change or break. They are not started yet."""
    made: list[Appliance] = []

    def make(name: str = "a", **more: object) -> Appliance:
        made.append(Appliance(tmp_path / name, tools, **{"world": world, **more}))
        return made[-1]

    yield make
    # One that still runs would act on the objects that the end of another one removes.
    others = made if len(made) > 1 else []
    do_all(*(appliance.stop for appliance in others), *(appliance.finish for appliance in made))
