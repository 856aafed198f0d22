"""The project's checks, by name: `nox -l` lists them, `nox -s tests` runs one.

They run in the environment that `scripts/test` made from the lock (`.venv`), so they check the pinned versions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))
from support.pythons import SUPPORTED, interpreters  # noqa: E402 - the tests' own module

nox.options.default_venv_backend = "none"
nox.options.sessions = [
    "lint",
    "types",
    "imports",
    "tests",
    "slow",
    "pythons",
    "e2e",
    "kind",
    "zipapp",
    "soak",
    "chaos",
    "chaos_kind",
]
nox.options.stop_on_first_error = False

# As a part of all checks (scripts/test) the session `tests` begins to measure coverage, which takes about 50 % more
# time. The session `slow` goes on with the same data, shows them and judges them.
BEGIN_COVERAGE = ["--cov", "--cov-report=", "--cov-fail-under=0"] if os.environ.get("BKPOOL_BRIEF") else []
END_COVERAGE = ["--cov", "--cov-append", "--cov-report=term:skip-covered"] if os.environ.get("BKPOOL_BRIEF") else []

# Then the other Pythons leave out what says nothing about the version of Python (CONTRIBUTING.md), and try as few
# examples as `nox -s tests` alone: the sessions `tests` and `slow` have just done the rest.
ONLY_PYTHON = ["-m", "not any_python"] if os.environ.get("BKPOOL_BRIEF") else []
FEW_EXAMPLES = {"BKPOOL_BRIEF": ""}

# Then only the oldest and the newest are tried. Few changes fail on one between them, and each takes five minutes.
OTHERS = (SUPPORTED[0], SUPPORTED[-1]) if os.environ.get("BKPOOL_BRIEF") else SUPPORTED

# Then a session that fails so often stops and shows why: waiting for every other test could take hours.
GIVE_UP = ["--maxfail=10"] if os.environ.get("BKPOOL_BRIEF") else []

# Tests of the fast suite hardly wait: one process for each core. Slow ones wait for programs and for time: one more.
CORES = os.cpu_count() or 1
FAST = ["--numprocesses", str(CORES), "-m", "not slow"]
SLOW = ["--numprocesses", str(CORES + 1), "-m", "slow"]

BIN = Path(sys.executable).parent
os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"

# Without bytecode every process of a test run compiles everything again: for pytest alone that is 6 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / ".nox" / "bytecode")


@nox.session
def lint(session: nox.Session) -> None:
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """The fast suite: all tests in tests/ that are not slow. It has to stay under a minute on two cores."""
    session.run("pytest", "tests", *FAST, *BEGIN_COVERAGE, *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The slow tests in tests/: they start programs, wait for real time, or repeat something very often."""
    session.run("pytest", "tests", *SLOW, *END_COVERAGE, *session.posargs)


@nox.session
def pythons(session: nox.Session) -> None:
    """The tests in tests/ on every other supported Python of this machine, each in an environment made from the lock.

    As a part of all checks it tries the oldest and the newest, and leaves out what says nothing about the version.
    """
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = interpreters(version for version in OTHERS if version != this)
    missing = [version for version in OTHERS if version != this and version not in found]
    session.log(f"session `tests` runs on Python {this}; found besides: {', '.join(found) or 'none'}")
    if missing:
        session.log(f"not on this machine, so not tested: {', '.join(missing)}")
    for version, interpreter in found.items():
        python = _environment(session, version, interpreter)
        command = (python, "-m", "pytest", "tests", "--numprocesses", str(CORES + 1), *ONLY_PYTHON, *session.posargs)
        session.run(*command, env=FEW_EXAMPLES, external=True)


def _environment(session: nox.Session, version: str, interpreter: str) -> str:
    """Returns an environment of this Python with the development lock. It is made again when the lock has changed."""
    directory = ROOT / ".nox" / f"python-{version}"
    python = str(directory / "bin" / "python")
    stamp = directory / "made-from"
    lock = ROOT / "requirements-dev.lock"
    wanted = hashlib.sha256(lock.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        session.run(interpreter, "-m", "venv", "--clear", str(directory), external=True)
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        session.run(*pip, "--require-hashes", "-r", str(lock), external=True)
        session.run(*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT), external=True)
        stamp.write_text(wanted)
    return python


@nox.session
def e2e(session: nox.Session) -> None:
    """The end-to-end tests: real buildkitd, buildx and registry, and the commands of the usage guide."""
    session.run("pytest", "e2e", "--ignore=e2e/kind", *GIVE_UP, *session.posargs)


@nox.session
def kind(session: nox.Session) -> None:
    """The end-to-end tests on a kind cluster, and those that need a cluster. Skipped without a container engine."""
    from bkpool.kind.engine import engine_fault  # noqa: PLC0415 - the other sessions do not need the SDK

    if fault := engine_fault():
        (session.error if os.environ.get("BKPOOL_CI") else session.skip)(f"no tests on kind: {fault}")
    if os.environ.get("BKPOOL_CI"):
        _delete_clusters(session)
    if not session.posargs:
        session.run("pytest", "e2e/adoption", *_pytest_kind(session), env={"BKPOOL_E2E_BACKEND": "kind"})
    # e2e/gateway starts gateways without an appliance. They are the same on every backend.
    kind_backend = {"BKPOOL_E2E_BACKEND": "kind"}
    session.run("pytest", "e2e", "--ignore=e2e/gateway", *GIVE_UP, *session.posargs, env=kind_backend)


def _delete_clusters(session: nox.Session) -> None:
    """Deletes the clusters that a run left behind when it was killed: nobody knows what else runs in them."""
    from bkpool.toolchain import Tool, Toolchain, default_cache  # noqa: PLC0415 - as above

    program = str(Toolchain(default_cache()).ensure(Tool.KIND))
    names = (f"bkpool-e2e{end}" for end in ("", "-life", "-life-late", "-foreign"))
    session.run(program, "delete", "clusters", *names, external=True)


def _pytest_kind(session: nox.Session) -> list[str]:
    """Loads pytest-kind's plugin with verified programs. Without them it would download others, unverified."""
    from bkpool.toolchain import Tool, Toolchain, default_cache  # noqa: PLC0415 - as above

    kubectl = shutil.which("kubectl")
    if kubectl is None:
        session.error("the tests on kind need kubectl on PATH")
    options = ["-p", "pytest_kind.plugin", "--keep-cluster", "--cluster-name", "bkpool-e2e"]
    options += ["--kind-bin", str(Toolchain(default_cache()).ensure(Tool.KIND))]
    options += ["--kind-kubectl-bin", kubectl]
    if image := os.environ.get("BKPOOL_E2E_NODE_IMAGE"):
        options += ["--kind-image", image]
    return options


# As a part of all checks (scripts/test) each takes a minute, and chaos uses the same seed every time.
BRIEF = ["--minutes", "1"] if os.environ.get("BKPOOL_BRIEF") else []
SAME = ["--seed", "6"] if BRIEF else []


@nox.session
def soak(session: nox.Session) -> None:
    """10,000 connections, then builds, ten minutes in all. Afterwards nothing may have grown."""
    if not BRIEF:  # 5 GB in each direction at once; in e2e it is 1 GB
        session.run("pytest", "e2e/gateway/test_streams_heavy.py", "-k", "every_byte", env={"BKPOOL_SOAK": "1"})
    session.run("python", "e2e/soak/run.py", *BRIEF, *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Ten minutes of builds while the appliance and its workers are killed at random (docs/testing.md)."""
    session.run("python", "e2e/chaos/run.py", *BRIEF, *SAME, *session.posargs)


@nox.session
def chaos_kind(session: nox.Session) -> None:
    """The same on a kind cluster, where pods, the API server and the network are broken too."""
    from bkpool.kind.engine import engine_fault  # noqa: PLC0415 - the other sessions do not need the SDK

    if fault := engine_fault():
        (session.error if os.environ.get("BKPOOL_CI") else session.skip)(f"no chaos on kind: {fault}")
    session.run("python", "e2e/chaos/run.py", "--backend", "kind", *BRIEF, *SAME, *session.posargs)


@nox.session
def zipapp(session: nox.Session) -> None:
    """Makes dist/bkpool.pyz and does the main job with it."""
    session.run("python", "scripts/build-zipapp")
    session.run("pytest", "tests/zipapp", *session.posargs, env={"BKPOOL_ZIPAPP": "dist/bkpool.pyz"})


@nox.session
def bench(session: nox.Session) -> None:
    """The gateway beside nginx, HAProxy and ghostunnel, the appliance beside BuildKit, leases by size."""
    session.run("python", "-m", "bench", *session.posargs)


@nox.session
def bench_kind(session: nox.Session) -> None:
    """The same on a kind cluster, beside kubectl port-forward and buildx's own driver."""
    session.run("python", "-m", "bench.kind", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Resolves the dependencies again and writes the lock files with hashes. Needs uv."""
    common = ("uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header")
    common = (*common, "--no-emit-index-url", "--python-version", "3.11", "pyproject.toml")
    session.run(*common, "-o", "requirements.lock", external=True)
    session.run(*common, "--group", "build", "-o", "requirements-install.lock", external=True)
    session.run(*common, "--group", "build", "--group", "dev", "-o", "requirements-dev.lock", external=True)


@nox.session
def stubs(session: nox.Session) -> None:
    """Generates bkpool/buildkit/stubs from its control.proto.

    tests/buildkit compares the result with the committed files.
    """
    outputs = [f"--{kind}_out=." for kind in ("python", "pyi", "grpclib_python")]
    session.run("python", "-m", "grpc_tools.protoc", "-I.", *outputs, "bkpool/buildkit/stubs/control.proto")
