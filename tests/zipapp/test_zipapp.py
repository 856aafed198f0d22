"""bkpool.pyz: its errors where it cannot run, and that it runs where it is supported.

The stub is tested alone, also with older Pythons if this machine has some. The whole file is tested if BKPOOL_ZIPAPP
names one, as `nox -s zipapp` does.
"""

import ast
import json
import os
import platform
import pwd
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bkpool.toolchain import default_cache
from support.pythons import SUPPORTED, interpreters

pytestmark = [pytest.mark.any_python, pytest.mark.slow]

STUB = Path(__file__).parents[2] / "scripts" / "zipapp_stub.py"
ZIPAPP = os.environ.get("BKPOOL_ZIPAPP")
TOO_OLD = ["2.7", "3.6", "3.9", "3.10"]

whole = pytest.mark.skipif(
    not ZIPAPP, reason="BKPOOL_ZIPAPP names no bkpool.pyz; `nox -s zipapp` makes and tests one"
)


def found(versions):
    """Returns the interpreters of these versions on this machine. Skips the test if there is none."""
    interpreters_here = interpreters(versions)
    if not interpreters_here:
        pytest.skip(f"this machine has none of {', '.join(f'python{version}' for version in versions)}")
    return interpreters_here


def supports():
    tree = ast.parse(STUB.read_text())
    values = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "SUPPORTS")
    return ast.literal_eval(next(values))


@pytest.fixture
def program(tmp_path):
    """Makes a file with the stub, which starts one line of code instead of pex.

    Arguments change what the stub supports.
    """

    def make(**changes):
        here = {"machine": platform.machine(), "pythons": [f"3.{sys.version_info.minor}"]}
        source = STUB.read_text().replace(repr(supports()).replace("'", '"'), repr(supports() | here | changes))
        assert repr(supports() | here | changes) in source
        path = tmp_path / "program.pyz"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("__main__.py", f"{source}\nimport os; print('handed over, ' + os.environ['PEX_ROOT'])\n")
        return path

    return make


def run(interpreter, path, *args, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [interpreter, path, *args], env=kept | environment, capture_output=True, text=True, check=False, timeout=300
    )


def refusal(done, exit_code):
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_the_stub_starts_the_program_on_a_supported_machine(program, tmp_path):
    done = run(sys.executable, program(), BKPOOL_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith(f"handed over, {tmp_path}/cache/pyz/3.")


def test_the_error_on_an_older_python_is_one_sentence(program):
    for interpreter in found(TOO_OLD).values():
        assert "bkpool needs Python 3.11 or newer" in refusal(run(interpreter, program()), 71)


def test_the_error_on_a_python_without_wheels_is_one_sentence(program):
    assert "this file is for CPython 3.0" in refusal(run(sys.executable, program(pythons=["3.0"])), 71)


def test_the_error_on_another_machine_is_one_sentence(program):
    assert "is for Linux riscv128, 64 bits, and this is Linux" in refusal(
        run(sys.executable, program(machine="riscv128")), 71
    )


def test_the_error_on_an_older_libc_is_one_sentence(program):
    assert "needs glibc 9.99 or newer, and this machine has" in refusal(
        run(sys.executable, program(glibc="9.99")), 71
    )


def test_the_error_of_an_unusable_cache_is_one_sentence(program, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(run(sys.executable, program(), BKPOOL_CACHE=str(tmp_path / "file" / "cache")), 77)
    assert "set BKPOOL_CACHE to a directory" in message


def test_the_stub_can_be_parsed_by_any_python():
    assert ast.parse(STUB.read_text(), feature_version=(3, 4))


@whole
def test_the_whole_file_refuses_an_older_python():
    for interpreter in found(TOO_OLD).values():
        refusal(run(interpreter, ZIPAPP, "version"), 71)


@whole
def test_the_whole_file_runs_with_each_supported_python(tmp_path):
    here = {"BKPOOL_CACHE": str(tmp_path / "cache"), "BKPOOL_HOME": str(tmp_path / "home")}
    for version, interpreter in found(SUPPORTED).items():
        done = run(interpreter, ZIPAPP, "version", "--verbose", **here)
        assert f'"python": "{version}.' in done.stdout
        assert "CPython 3.11, 3.12, 3.13 on Linux" in done.stdout
        # There is nothing to purge, but the command imports the appliance and so all modules with compiled parts.
        purge = run(interpreter, ZIPAPP, "down", "--purge", **here)
        assert (purge.returncode, purge.stderr) == (0, "")


@whole
def test_the_whole_file_does_the_main_job_from_an_empty_home(tmp_path, buildkitd, buildx):
    home = tmp_path / "home"
    home.mkdir()
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM scratch\nCOPY hello /\n")
    (context / "hello").write_text("hi")
    # It uses the tools of this machine. Other tests download them.
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tools").symlink_to(default_cache() / "tools")
    here = {"HOME": str(home), "BKPOOL_CACHE": str(cache), "BKPOOL_HOME": str(tmp_path / "state")}
    any_port = [part for what in ("api", "gateway", "metrics") for part in (f"--{what}-address", "127.0.0.1:0")]

    def bkpool(*args):
        done = run(sys.executable, ZIPAPP, *args, **here)
        assert done.returncode == 0, done.stderr
        return done.stdout

    bkpool("up", "-d", "--backend", "process", *any_port)
    try:
        bkpool("build", "--output", f"type=local,dest={tmp_path / 'out'}", context)
        assert (tmp_path / "out" / "hello").read_text() == "hi"
        bkpool("allocate", "--out", tmp_path / "certs")
        assert json.loads(bkpool("release", "--token", tmp_path / "certs")) == {"status": "released"}
    finally:
        assert json.loads(bkpool("down", "--now", "--purge")) == {"stopped": True, "purged": True, "leftovers": 0}


@whole
def test_the_go_modules_of_the_tools_are_inside():
    with zipfile.ZipFile(ZIPAPP) as file:
        assert {"bkpool/toolchain/gotools/go.mod", "bkpool/toolchain/gotools/go.sum"} <= set(file.namelist())


@pytest.fixture
def user():
    """An unprivileged user, made for the test, with ranges of subordinate ids."""
    if os.geteuid() != 0:
        pytest.skip("only root can create the user of this test")
    name = f"bkpool-zipapp-{os.getpid()}"
    subprocess.run(["useradd", "--create-home", name], check=True, capture_output=True)
    try:
        if f"{name}:" not in Path("/etc/subuid").read_text():
            ranges = ["--add-subuids", "800000-865535", "--add-subgids", "800000-865535"]
            subprocess.run(["usermod", *ranges, name], check=True, capture_output=True)
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


@whole
def test_an_ordinary_user_does_the_main_job(user, buildkitd, buildctl, buildx, runc, rootlesskit):
    """Runs up, a build with RUN steps, and down --purge without root. The home has only the programs at first."""
    home = Path(user.pw_dir)
    cached = home / ".cache" / "bkpool" / "tools" / "bin"
    cached.mkdir(parents=True)
    for program in (buildkitd, buildctl, buildx, runc, rootlesskit):
        shutil.copy(program, cached)
    shutil.copytree(Path(__file__).parents[2] / "examples" / "hello", home / "hello")
    (home / "tools").mkdir()
    shutil.copy(buildctl, home / "tools" / "buildctl")
    shutil.copy(ZIPAPP, home / "bkpool.pyz")
    for found in (home, *home.rglob("*")):
        os.chown(found, user.pw_uid, user.pw_gid)

    def as_user(*args):
        environment = {"HOME": str(home), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "USER": user.pw_name}
        return subprocess.run(
            ["/usr/bin/python3", str(home / "bkpool.pyz"), *args],
            cwd=home,
            env=environment,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            umask=0o077,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    ports = [f"--{name}-address=127.0.0.1:0" for name in ("api", "gateway", "metrics")]
    up = as_user("up", "-d", "--backend", "process", *ports)
    assert up.returncode == 0, up.stderr
    try:
        build = as_user("build", "--progress", "plain", "--build-context", f"tools={home}/tools", str(home / "hello"))
        assert build.returncode == 0, build.stderr + (home / ".local/state/bkpool/logs/appliance.log").read_text()
        assert "buildctl github.com/moby/buildkit" in build.stderr, "the RUN step really ran"
    finally:
        down = as_user("down", "--now", "--purge")
    assert down.returncode == 0, down.stderr
    assert not list((home / ".local/state/bkpool").glob("slots/*"))
