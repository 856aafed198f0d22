"""Workers of an unprivileged user. The user is real, made for these tests, and has a range of subordinate ids."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from bkpool.toolchain import Tool, Toolchain, default_cache
from harness import eventually, only_on

pytestmark = [
    only_on("process", "it tests the runtime of processes"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can create the user of these tests"),
]

NAME = f"bkpool-e2e-{os.getpid()}"

# Everything is imported before the change of user, because the user may not be able to read the interpreter's files.
AS_USER = """
import asyncio, os, pathlib, signal, subprocess, sys
import concurrent.futures.thread, encodings.idna
from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers import DaemonState
from bkpool.workers.processes import environment
from bkpool.workers.processes.runtime import Binaries, ProcessRuntime
from support.fake_s3 import fake_s3

uid, gid, home = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
for delegated in sys.argv[4:]:
    (pathlib.Path(delegated) / "cgroup.procs").write_text("0")
os.setgroups([]); os.setgid(gid); os.setuid(uid)
os.environ.update(HOME=str(home)); os.environ.pop("XDG_RUNTIME_DIR", None); os.umask(0o077)
sys.executable = "/usr/bin/python3"  # of the system, which every user may run
tools = home / "tools"
binaries = Binaries(tools / "buildkitd", tools / "runc", tools / "rootlesskit")
slot, pool = Slot("default", "default", 0), Pool(metadata=Metadata(name="default"))

async def no_report(message):
    raise AssertionError(message)

async def build(endpoint, *options):
    command = [tools / "buildctl", f"--addr={endpoint}", "build", "--progress=plain", "--frontend=dockerfile.v0"]
    command += [f"--local=context={home}/context", f"--local=dockerfile={home}/context"]
    command += options
    return await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

async def output(endpoint, *options):
    process = await build(endpoint, *options)
    return (await process.communicate())[0].decode()
"""

PROGRAM = r"""
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>
static void reach(const char *host, int port, const char *interface) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int s = socket(AF_INET, SOCK_STREAM, 0);
    inet_pton(AF_INET, host, &to.sin_addr);
    if (interface) setsockopt(s, SOL_SOCKET, SO_BINDTODEVICE, interface, strlen(interface) + 1);
    printf("%s:%d through %s: %s\n", host, port, interface ? interface : "any",
           connect(s, (struct sockaddr *)&to, sizeof to) ? "blocked" : "reached");
    close(s);
}
int main(int argc, char **argv) {
    if (argc == 4) {
        reach(argv[2], atoi(argv[3]), NULL);
        reach(argv[2], atoi(argv[3]), "eth0");
        return 0;
    }
    printf("the step runs as %d\n", getuid());
    printf("raw sockets: %d\n", prctl(PR_CAPBSET_READ, 13 /* CAP_NET_RAW */));
    fflush(stdout);
    if (argc > 1) sleep(atoi(argv[1]));
    return 0;
}
"""

# On most machines every user may open this device. Where only root may, the tests make one for everybody.
USABLE_TUN = """
mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$0" "$@"
"""

Runs = Callable[..., str]


@pytest.fixture(scope="module")
def user() -> Iterator[pwd.struct_passwd]:
    for program in ("useradd", "newuidmap", "gcc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    subprocess.run(["useradd", "--create-home", NAME], check=True, capture_output=True)
    try:
        if f"{NAME}:" not in Path("/etc/subuid").read_text():
            ranges = ["--add-subuids", "700000-765535", "--add-subgids", "700000-765535"]
            subprocess.run(["usermod", *ranges, NAME], check=True, capture_output=True)
        yield pwd.getpwnam(NAME)
    finally:
        subprocess.run(["userdel", "--remove", NAME], check=True, capture_output=True)


@pytest.fixture(scope="module")
def home(user: pwd.struct_passwd) -> Path:
    home = Path(user.pw_dir)
    toolchain = Toolchain(default_cache())
    (home / "tools").mkdir()
    for tool in (Tool.BUILDKITD, Tool.BUILDCTL, Tool.RUNC, Tool.ROOTLESSKIT):
        shutil.copy(toolchain.ensure(tool), home / "tools" / tool.value)
    context = home / "context"
    context.mkdir()
    (context / "step.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-static", "-Os", "-o", context / "step", context / "step.c"], check=True)
    steps = 'RUN ["/step"]\nUSER 1000\nRUN ["/step"]\nUSER 0\n'
    (context / "Dockerfile").write_text(
        f"FROM scratch\nCOPY step /step\nCOPY --chown=1000:1000 step.c /owned/\n{steps}"
    )
    for found in (home, *home.rglob("*")):
        os.chown(found, user.pw_uid, user.pw_gid)
    return home


@pytest.fixture
def as_user(user: pwd.struct_passwd, home: Path) -> Iterator[Runs]:
    def run(script: str, delegated: Iterable[Path] = ()) -> str:
        arguments = [str(user.pw_uid), str(user.pw_gid), str(home), *map(str, delegated)]
        indented = "\n".join(f"    {line}" for line in script.strip().splitlines())
        program = f"{AS_USER}\nasync def main():\n{indented}\nasyncio.run(main())"
        command = ["unshare", "--mount", "sh", "-c", USABLE_TUN, sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    # What a test that failed has left: the next one would find it, and with it the user cannot be removed.
    for pid in processes_of(user):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes_of(user), "no process of the user is left")


def processes_of(user: pwd.struct_passwd) -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
                if entry.stat().st_uid == user.pw_uid and command:  # empty: has ended, not yet reaped
                    found[int(entry.name)] = command
            except OSError:
                continue
    return found


def test_an_unprivileged_user_builds_and_the_cache_is_removed(as_user, user, home):
    output = as_user("""
runtime = ProcessRuntime(home / "state", binaries)
endpoint = await runtime.daemons.start(slot, "uid-1", "anna", pool, no_report)
print(await output(endpoint))
await runtime.daemons.stop(slot)
print("SECOND", await output(await runtime.daemons.start(slot, "uid-1", "anna", pool, no_report)))
owned = (home / "state").glob("slots/*/*/*/root/*/snapshots/snapshots/*/fs/owned/step.c")
print("subordinate", all(found.lstat().st_uid != os.getuid() for found in owned))
await runtime.caches.wipe(slot)
print("left", list((home / "state").glob("slots/*")), runtime.caches.owners())
await runtime.close(stop_workers=True)
""")
    assert "the step runs as 0" in output
    assert "the step runs as 1000" in output
    assert "raw sockets: 0" in output
    assert "raw sockets: 1" not in output
    assert "CACHED" in output.partition("SECOND")[2]
    assert "subordinate True" in output
    assert "left [] {}" in output
    assert processes_of(user) == {}


def test_the_containers_of_a_killed_rootless_daemon_end_and_the_next_runtime_adopts(as_user, user, home):
    dockerfile = home / "context" / "Dockerfile"
    dockerfile.write_text('FROM scratch\nCOPY step /step\nRUN ["/step", "4711"]\n')
    output = as_user("""
changed = asyncio.Event()
first = ProcessRuntime(home / "state", binaries)
first.daemons.on_change(lambda _slot: changed.set())
endpoint = await first.daemons.start(slot, "uid-1", "anna", pool, no_report)
building = await build(endpoint)
while b"the step runs" not in (line := await building.stdout.readline()):
    assert line
changed.clear()
for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdigit() and os.access(entry / "cmdline", os.R_OK):
        if (entry / "cmdline").read_bytes().startswith(bytes(tools / "buildkitd")):
            os.kill(int(entry.name), signal.SIGKILL)
while (seen := first.daemons.observe()[slot]).state is not DaemonState.EXITED:
    await asyncio.wait_for(changed.wait(), 60)
    changed.clear()
print(seen.state, seen.message, seen.log_tail)
await building.communicate()

await first.daemons.start(slot, "uid-1", "anna", pool, no_report)
await first.close(stop_workers=False)
second = ProcessRuntime(home / "state", binaries)
await second.adopt()
print("ADOPTED", second.daemons.observe()[slot].state)
await second.purge()
await second.close(stop_workers=True)
""")
    assert output.startswith("exited") or "\nexited" in output
    assert "killed by SIGKILL" in output, output
    assert "ADOPTED ready" in output
    assert processes_of(user) == {}


@pytest.fixture
def delegated(user: pwd.struct_passwd) -> Iterator[list[Path]]:
    """Cgroups that belong to the user, as those of a systemd unit with Delegate=yes."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        pytest.skip("this test was written for cgroup version 1")
    made = [top / controller / NAME for controller in ("cpu", "memory", "pids")]
    for directory in made:
        directory.mkdir()
        for path in (directory, directory / "cgroup.procs"):
            os.chown(path, user.pw_uid, user.pw_gid)
    yield made
    for directory in made:
        directory.rmdir()


def test_limits_hold_for_a_user_where_cgroups_are_delegated(as_user, home, delegated):
    (home / "context" / "Dockerfile").write_text('FROM scratch\nCOPY step /step\nRUN ["/step"]\n')
    output = as_user(
        """
runtime = ProcessRuntime(home / "state", binaries)
spec = PoolSpec.model_validate({"resources": {"buildkit": {"limits": {"memory": "1Gi", "cpu": 1}}}})
limited = pool.model_copy(update={"spec": spec})
endpoint = await runtime.daemons.start(slot, "uid-1", "anna", limited, no_report)
print(await output(endpoint, "--opt=cgroup-parent=/elsewhere"))
for controller, file in (("pids", "pids.max"), ("memory", "memory.limit_in_bytes"), ("cpu", "cpu.cfs_quota_us")):
    (limit,) = pathlib.Path("/sys/fs/cgroup", controller).glob(f"bkpool-e2e-*/bkpool-*/default.default.0/{file}")
    members = (limit.parent / "daemon" / "cgroup.procs").read_text().split()
    print(file, limit.read_text().strip(), len(members) > 1)
await runtime.purge()
await runtime.close(stop_workers=True)
""",
        delegated,
    )
    assert "the step runs as 0" in output
    assert "limits_incomplete" not in output
    assert "pids.max 8192 True" in output
    assert f"memory.limit_in_bytes {1 << 30} True" in output
    assert "cpu.cfs_quota_us 100000 True" in output
    assert [list(directory.glob("*/")) for directory in delegated] == [[], [], []]


def test_a_user_without_a_cgroup_is_told_once_that_limits_do_not_hold(as_user):
    output = as_user("""
runtime = ProcessRuntime(home / "state", binaries)
for uid in ("uid-1", "uid-2"):
    await runtime.daemons.start(slot, uid, "anna", pool, no_report)
    await runtime.daemons.stop(slot)
await runtime.purge()
await runtime.close(stop_workers=True)
""")
    assert output.count("workers.limits_incomplete") == 1
    assert "cpu, memory, pids" in output


def test_a_cache_in_s3_is_never_signed_by_the_user_who_runs_the_pool(as_user, home):
    (home / "context" / "Dockerfile").write_text('FROM scratch\nCOPY step /step\nRUN ["/step"]\n')
    output = as_user("""
credentials = home / ".aws" / "credentials"
credentials.parent.mkdir()
credentials.write_text("[default]\\naws_access_key_id = AKIAOFTHEHOST\\naws_secret_access_key = x\\n")
runtime = ProcessRuntime(home / "state", binaries)
with fake_s3() as s3:
    spec = PoolSpec.model_validate({"networking": {"hostPorts": [s3.port]}})
    with_port = pool.model_copy(update={"spec": spec})
    endpoint = await runtime.daemons.start(slot, "uid-1", "anna", with_port, no_report)
    await output(endpoint, f"--export-cache={s3.cache()}")
    print("SIGNED BY THE HOST", s3.signers)
    await output(endpoint, f"--export-cache={s3.cache(access_key_id='own', secret_access_key='y')}")
    print("SIGNED BY THE TENANT", sorted(set(s3.signers)))
await runtime.purge()
await runtime.close(stop_workers=True)
""")
    assert "SIGNED BY THE HOST []" in output
    assert "SIGNED BY THE TENANT ['own']" in output


def test_a_build_of_an_unprivileged_user_reaches_nothing_of_the_machine_but_the_chosen_port(as_user, user, home):
    output = as_user("""
async def greet(reader, writer):
    await reader.read(1)
    writer.write(b"HTTP/1.0 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello")
    writer.close()

closed, chosen = [await asyncio.start_server(greet, "0.0.0.0", 0) for _ in range(2)]
closed_port, chosen_port = [server.sockets[0].getsockname()[1] for server in (closed, chosen)]
runtime = ProcessRuntime(home / "state", binaries, network=NetworkPrograms.find(os.environ["PATH"]))
await runtime.try_network()
spec = PoolSpec.model_validate({"networking": {"hostPorts": [chosen_port]}})
endpoint = await runtime.daemons.start(slot, "uid-1", "anna", pool.model_copy(update={"spec": spec}), no_report)
for port in (closed_port, chosen_port):
    steps = [f'RUN ["/step", "reach", "{host}", "{port}"]' for host in ("127.0.0.1", "169.254.169.254")]
    (home / "context" / "Dockerfile").write_text("\\n".join(["FROM scratch", "COPY step /step", *steps]))
    print("RUN", port == chosen_port, await output(endpoint))
    (home / "context" / "Dockerfile").write_text(f"FROM scratch\\nADD http://127.0.0.1:{port}/file /file\\n")
    print("ADD", port == chosen_port, await output(endpoint))
await runtime.purge()
await runtime.close(stop_workers=True)
closed.close(), chosen.close()
""")
    closed, chosen = output.partition("RUN False")[2].split("RUN True")
    assert "reached" not in closed
    assert closed.count("blocked") >= 4
    assert "connection refused" in closed.partition("ADD False")[2]
    assert chosen.count("through any: reached") == 1
    assert "through eth0: reached" not in chosen
    assert "ERROR" not in chosen.partition("ADD True")[2]
    assert processes_of(user) == {}


def test_errors_name_what_an_unprivileged_user_lacks_and_the_fix(as_user):
    start = """
try:
    environment.PATH = "{path}"
    runtime = ProcessRuntime(home / "state", {binaries}, environ={{}})
    await runtime.daemons.start(slot, "uid-1", None, pool, no_report)
except HostFault as fault:
    print(fault.message, "|", fault.hint)
"""
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    assert "uidmap" in as_user(start.format(binaries="binaries", path="/nowhere"))
    without = "Binaries(binaries.buildkitd, binaries.runc)"
    assert "rootlesskit is missing" in as_user(start.format(binaries=without, path=path))
