"""A hostile build: what its steps and its buildkitd reach of the machine, of other builds and of the network.

The tests attack by RUN and by ADD, because buildkitd itself fetches the latter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from bkpool.core.names import Slot
from bkpool.home.runtime_directory import home_digest
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers.processes.daemon import MARK
from bkpool.workers.processes.runtime import Binaries, ProcessRuntime
from bkpool.workers.processes.slot_files import SlotFiles
from harness import Answer, Appliance, Context, eventually, free_port, only_on, pool, read_until
from support.objects import pool as a_pool

pytestmark = only_on("process", "pods have a network of their own by themselves")

_NUMBER = count()
ANOTHER_ADDRESS = "198.51.100.79"  # of the host, and not that of the default route
ROUNDS = int(os.environ.get("BKPOOL_ROUNDS", "6"))  # 200 before a release
DOOR = free_port()  # a port of the host's loopback that one pool opens


class _Host(socketserver.BaseRequestHandler):
    """A service of the host that tells everybody its secret."""

    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 16\r\n\r\nthe host's data\n")


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def serving(kind: type[_Server], host: str, port: int = 0) -> Iterator[int]:
    with kind((host, port), _Host) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def appliance(tmp_path_factory, tools, world) -> Iterator[Appliance]:
    appliance = Appliance(tmp_path_factory.mktemp("network"), tools, world=world)
    listed = {"policy": "listed", "allowedCIDRs": ["192.0.2.0/24"]}
    pools = [
        pool("default", scaling={"max": 3}),
        pool("door", networking={"hostPorts": [DOOR]}),
        pool("listed", networking={"egress": listed}),
        pool("untrusted", untrusted=True),
        pool("greedy", networking={"hostPorts": [appliance.ports["api"]]}),
    ]
    appliance.up_from(pools)
    yield appliance
    appliance.finish()


@pytest.fixture
def context(tmp_path, program) -> Context:
    return Context(tmp_path / "context", program)


def build(appliance: Appliance, context: Context, *steps: str, pool: str = "default") -> str:
    """The output of a build with these steps, none of which was taken from a cache."""
    context.dockerfile(f"say run-{next(_NUMBER)}-{os.getpid()}", *steps)
    return bkpool_build(appliance, context, pool).ok().text


def bkpool_build(appliance: Appliance, context: Context, pool: str = "default") -> Answer:
    return appliance.cli("build", "--pool", pool, "--progress", "plain", str(context.path))


def connected(output: str) -> dict[str, str]:
    """What the `connect` steps report: address to `reached`, `silent` or `blocked`, one word for each step."""
    found: dict[str, str] = {}
    for verdict, address in re.findall(r"^#\d+ [\d.]+ (reached|silent|blocked) (\S+)", output, re.MULTILINE):
        found[address] = " ".join(filter(None, (found.get(address), verdict)))
    return found


@pytest.fixture
def another_address() -> Iterator[str]:
    # `replace`: a run that was killed has left it.
    subprocess.run(["ip", "address", "replace", f"{ANOTHER_ADDRESS}/32", "dev", "lo"], check=True)
    yield ANOTHER_ADDRESS
    subprocess.run(["ip", "address", "del", f"{ANOTHER_ADDRESS}/32", "dev", "lo"], check=True)


def test_a_step_reaches_no_address_and_no_socket_of_the_host(appliance, context, another_address):
    name = f"\0bkpool-e2e-{os.getpid()}"
    with (
        serving(_Server, "0.0.0.0") as port,
        serving(_ServerIPv6, "::1") as port6,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(name)
        abstract.listen()
        own = [f"127.0.0.1:{appliance.ports[one]}" for one in ("api", "gateway", "metrics")]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            main = probe.getsockname()[0]
        addresses = [*own, *(f"{host}:{port}" for host in ("127.0.0.1", main, another_address)), f"[::1]:{port6}"]
        addresses += ["169.254.169.254:80", "[fd00:ec2::254]:80"]
        steps = [f"connect tcp {address}" for address in addresses]
        steps += [f"connect tcp {address} eth0" for address in addresses if not address.startswith("[")]
        output = build(appliance, context, *steps, f"connect unix @{name[1:]}")
    found = connected(output)
    assert set(found) == {*addresses, f"@{name[1:]}"}
    assert all(set(verdicts.split()) == {"blocked"} for verdicts in found.values()), found


def test_buildkitd_itself_fetches_nothing_from_the_host(appliance, context, another_address):
    with serving(_Server, "0.0.0.0") as port:
        for host in ("127.0.0.1", another_address):
            context.write(f"FROM scratch\nADD http://{host}:{port}/file-{next(_NUMBER)} /file\n")
            answer = bkpool_build(appliance, context)
            assert answer.code != 0, answer.text
            assert "the host's data" not in answer.text
            assert re.search("connection refused|no route to host", answer.text), answer.text


def test_a_step_does_not_reach_the_server_of_another_build(appliance, context, tmp_path, program):
    other = Context(tmp_path / "other", program)
    other.dockerfile(f"say {next(_NUMBER)}", "listen :47991 60s")
    serving_build = appliance.start("bkpool", "build", "--progress", "plain", str(other.path))
    read_until(serving_build, "listening on")
    found = connected(build(appliance, context, "connect tcp 127.0.0.1:47991", "connect tcp [::1]:47991"))
    serving_build.terminate()
    assert found == {"127.0.0.1:47991": "blocked", "[::1]:47991": "blocked"}


def test_a_step_can_still_resolve_serve_itself_and_have_no_network(appliance, context):
    context.write(
        "\n".join(
            [
                "FROM scratch",
                "COPY program /program",
                f'RUN ["/program", "say", "{next(_NUMBER)}"]',
                'RUN ["/program", "interfaces"]',
                'RUN ["/program", "resolve", "localhost"]',
                'RUN --network=none ["/program", "interfaces"]',
                "",
            ]
        )
    )
    output = bkpool_build(appliance, context).ok().text
    interfaces = re.findall(r"^#(\d+) [\d.]+ interface (\S+)", output, re.MULTILINE)
    step = interfaces[0][0]
    assert [name for of, name in interfaces if of == step] == ["lo", "eth0"]
    assert [name for of, name in interfaces if of != step] == ["lo"]
    assert re.search(r"resolved localhost \[.*127.0.0.1", output)


def test_a_port_of_the_hosts_loopback_is_open_to_the_pool_that_names_it(appliance, context):
    with serving(_Server, "127.0.0.1", DOOR), serving(_Server, "127.0.0.1") as closed:
        steps = [f"connect tcp 127.0.0.1:{DOOR}", f"connect tcp [::1]:{DOOR}", f"connect tcp 127.0.0.1:{closed}"]
        found = connected(build(appliance, context, *steps, pool="door"))
        assert found == {
            f"127.0.0.1:{DOOR}": "reached",
            f"[::1]:{DOOR}": "reached",
            f"127.0.0.1:{closed}": "blocked",
        }
        context.write(f"FROM scratch AS one\nADD http://localhost:{DOOR}/file-{next(_NUMBER)} /file\n")
        bkpool_build(appliance, context, "door").ok()


def test_a_registry_on_loopback_that_the_pool_does_not_name_is_explained(appliance, context):
    context.write(f"FROM localhost:{DOOR}/image-{next(_NUMBER)}\n")
    with serving(_Server, "127.0.0.1", DOOR):
        answer = bkpool_build(appliance, context)
    assert answer.code == 1
    assert f"hostPorts: [{DOOR}]" in answer.err


def test_a_port_of_bkpool_itself_is_never_opened(appliance, context):
    refused = bkpool_build(appliance, context, "greedy")
    assert refused.code != 0
    assert "spec.networking.hostPorts" in refused.err
    assert "bkpool itself uses" in refused.err


def test_the_egress_of_the_spec_holds(appliance, context):
    steps = ["connect udp 10.0.0.1:9", "connect udp 192.0.2.1:9", "connect udp 8.8.8.8:9"]
    allowed = {"silent": True, "reached": True, "blocked": False}

    def reaches(pool: str) -> list[bool]:
        return [allowed[verdict] for verdict in connected(build(appliance, context, *steps, pool=pool)).values()]

    assert reaches("default") == [True, True, True]
    assert reaches("untrusted") == [False, False, True]
    assert reaches("listed") == [False, True, False]


def marked(home: Path) -> list[str]:
    """The processes of this home's workers. Without a process the kernel keeps no network namespace."""
    mark = f"{MARK}={home_digest(home)}/".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            environment = (process / "environ").read_bytes().split(b"\0")
            if any(variable.startswith(mark) for variable in environment):
                found.append(process.name)
    return found


def interfaces() -> set[str]:
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


async def test_workers_that_come_and_go_leave_nothing(tmp_path, tools):
    """Two at a time. Every other pair is killed by kill -9, as the appliance would find it after a crash."""
    binaries = Binaries(tools["buildkitd"], tools["runc"], tools["rootlesskit"])
    slots = [Slot("default", "default", number) for number in range(2)]
    programs = NetworkPrograms.find(os.environ["PATH"])
    runtime = ProcessRuntime(tmp_path / "home", binaries, network=programs)

    async def no_report(message: str) -> None:
        raise AssertionError(message)

    before = interfaces()
    try:
        for round_ in range(ROUNDS):
            starts = (runtime.daemons.start(slot, f"uid-{round_}", None, a_pool(), no_report) for slot in slots)
            await asyncio.gather(*starts)
            if round_ % 2:
                for slot in slots:
                    os.kill(SlotFiles(tmp_path / "home", slot).read_daemon().pid, signal.SIGKILL)
            await asyncio.gather(*(runtime.daemons.stop(slot) for slot in slots))
    finally:
        await runtime.close(stop_workers=True)
    eventually(lambda: not marked(tmp_path / "home"), "every process has ended, pasta too")
    assert interfaces() == before


def test_without_the_programs_only_the_admin_is_served(tmp_path_factory, tools, world):
    hiding = tmp_path_factory.mktemp("hiding") / "bkpool"
    hiding.write_text(
        "#!/bin/sh\n"
        'for name in pasta nft; do mount --bind /dev/null "$(readlink -f "$(command -v $name)")"; done\n'
        f'exec {sys.executable} -m bkpool "$@"\n'
    )
    program = ["unshare", "--mount", "sh", str(hiding)]
    appliance = Appliance(tmp_path_factory.mktemp("without"), tools, world=world, program=program)
    appliance.up("--dev-issuer", "--dev-issuer-address", f"127.0.0.1:{free_port()}")
    assert appliance.described["missingNetwork"]["hint"].startswith("Install passt nftables")
    token = appliance.cli("oidc-token", "--oidc-actor", "anna").ok().out.strip()
    status, answer = appliance.http("GET", "/api/v1/pools", bearer=token)
    assert status == 403
    assert "--host-network" in answer["error"]["hint"]
    assert appliance.http("GET", "/api/v1/pools")[0] == 200
    checked = {check["name"]: check for check in appliance.cli("doctor", "--json").json["checks"]}
    assert checked["network"]["fix"].startswith("Install passt nftables")
    appliance.down().ok()
    appliance.up("--host-network")
    assert "missingNetwork" not in appliance.described
    token = appliance.cli("oidc-token", "--oidc-actor", "anna").ok().out.strip()
    assert appliance.http("GET", "/api/v1/pools", bearer=token)[0] == 200
    appliance.finish()
