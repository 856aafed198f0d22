"""The network of a worker, made by the real programs. What runs in it stands for a worker."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bkpool.core.pool import PoolSpec
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers.processes import worker_init
from bkpool.workers.processes.init_program import InitProgram

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user needs rootlesskit for this: see e2e"),
    pytest.mark.slow,
]

RESOLVER = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250}.53"  # tests may run beside each other
NETWORK = os.getpid() % (1 << 14) * 4  # of four addresses; likewise
QUERY = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05inner\x04corp\x00\x00\x01\x00\x01"


def own_address(number: int) -> str:
    """An address for the host that no other run of these tests gives it; of the half that no worker uses."""
    return f"198.18.{NETWORK >> 8}.{(NETWORK & 0xFF) + number}"


class InNetwork:
    """Runs a Python program in the network of a worker, on a host with a resolv.conf of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.resolv_conf = directory / "hosts-resolv.conf"
        self.resolv_conf.write_text(f"nameserver {RESOLVER}\nsearch corp\n")

    def __call__(
        self,
        program: str,
        *arguments: str,
        spec: PoolSpec = PoolSpec(),  # noqa: B008 - immutable
        host: str = "",
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(program, *arguments, spec=spec)
        if host:  # another host, made by these lines of shell
            alone = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            command = [*alone, "sh", "-e", "-c", f'{host}\n"$0" "$@"; exit $?', *command]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    def command(self, program: str, *arguments: str, spec: PoolSpec = PoolSpec()) -> list[str]:  # noqa: B008
        found = NetworkPrograms.find(os.environ["PATH"])
        shutil.rmtree(self.directory / "init", ignore_errors=True)
        init = InitProgram(found, {}, frozenset).command(self.directory / "init", spec)
        hosts_network = self.directory / "hosts-network"
        script = (
            f'mount --bind {self.resolv_conf} "$(readlink -f /etc/resolv.conf)" && touch {hosts_network} && '
            f'mount --bind /proc/self/ns/net {hosts_network} && exec "$0" "$@"'
        )
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        ready = str(self.directory / "init" / "ready")
        waiting = f"import os, time\nwhile not os.path.exists({ready!r}): time.sleep(0.005)\n"
        return [*namespaces, *init, sys.executable, "-c", waiting + program, *arguments]


@pytest.fixture
def in_network(tmp_path: Path) -> InNetwork:
    (tmp_path / "worker").mkdir()
    return InNetwork(tmp_path / "worker")


def test_without_a_resolv_conf_a_worker_says_so_in_one_line(in_network):
    command = in_network.command("print('started')")
    command[command.index("-c") + 1] = (
        'mount -t tmpfs none "$(dirname "$(readlink -f /etc/resolv.conf)")" && exec "$0" "$@"'
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0, done.stdout) == (True, "")
    (line,) = done.stderr.splitlines()
    assert line == (
        "the worker's network: /etc/resolv.conf of this machine cannot be read: No such file or directory"
    )


class _Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, over TCP or UDP."""

    def handle(self) -> None:
        if isinstance(self.request, tuple):
            data, server = self.request
            server.sendto(data, self.client_address)
        else:
            self.request.sendall(self.request.recv(4096))


class _TCP(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True  # a client that stays does not keep a test from ending


class _UDP(socketserver.ThreadingUDPServer):
    daemon_threads = True


class _IPv6(_TCP):
    address_family = socket.AF_INET6


@contextmanager
def echoing(kind: type[socketserver.BaseServer], host: str, port: int = 0) -> Iterator[int]:
    """A server of the host; yields its port."""
    with kind((host, port), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


REACH = """
import socket, sys
for target in sys.argv[1:]:
    host, port, *through = target.split(",")
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    s.settimeout(5)  # so long without an answer is one of the answers
    try:
        if through:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, through[0].encode())
        s.connect((host, int(port)))
        s.sendall(b"hello")
        print(target, s.recv(100).decode() or "closed")
    except OSError as error:
        print(target, "blocked", error.strerror or error)
"""


def reached(answer: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert answer.returncode == 0, answer.stderr
    return dict(line.split(" ", 1) for line in answer.stdout.splitlines())


def test_nothing_of_the_host_is_reached_not_even_through_one_interface(in_network, another_address):
    with echoing(_TCP, "0.0.0.0") as port, echoing(_IPv6, "::1") as port6:
        targets = [f"127.0.0.1,{port}", f"127.0.0.1,{port},eth0", f"{another_address},{port}"]
        targets += [f"{another_address},{port},eth0", f"::1,{port6}", "169.254.169.254,80", "169.254.169.254,80,eth0"]
        found = reached(in_network(REACH, *targets))
        here = reached(
            subprocess.run([sys.executable, "-c", REACH, targets[0]], check=False, capture_output=True, text=True)
        )
    assert here == {targets[0]: "hello"}  # so the server does answer
    assert set(found) == set(targets)
    assert all(what.startswith("blocked") for what in found.values()), found


@pytest.fixture
def another_address() -> Iterator[str]:
    """An address of the host that is not that of the default route."""
    address = own_address(1)
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    yield address
    subprocess.run(["ip", "address", "del", f"{address}/32", "dev", "lo"], check=True)


@pytest.fixture
def local_routes() -> Iterator[list[str]]:
    """Addresses that are the host's by a route alone; no interface has them."""
    ipv6 = f"fd77:77:{os.getpid() >> 16:x}:{os.getpid() & 0xFFFF:x}::"
    routes = [f"{own_address(0)}/30", f"{ipv6}/64"]
    for route in routes:
        subprocess.run(["ip", "route", "add", "local", route, "dev", "lo"], check=True)
    yield [own_address(2), f"{ipv6}5"]
    for route in routes:
        subprocess.run(["ip", "route", "del", "local", route, "dev", "lo"], check=True)


def test_an_address_that_a_route_makes_the_hosts_is_refused(in_network, local_routes):
    ipv4, ipv6 = local_routes
    with echoing(_TCP, "0.0.0.0") as port, echoing(_IPv6, "::") as port6:
        targets = [f"{ipv4},{port}", f"::ffff:{ipv4},{port}", f"{ipv6},{port6}", f"{ipv6},{port6},eth0"]
        here = reached(
            subprocess.run([sys.executable, "-c", REACH, *targets[:3]], check=False, capture_output=True, text=True)
        )
        found = reached(in_network(REACH, *targets))
    assert set(here.values()) == {"hello"}
    assert all(what.startswith("blocked") for what in found.values()), found


LATER = own_address(3)
"""An address that a program in a worker adds to the host."""


def reach_later(in_network: InNetwork) -> str:
    """A program that adds the address in the host's network, waits until the rules have it, and tries its targets."""
    network = in_network.directory / "hosts-network"
    add = ["nsenter", f"--net={network}", "ip", "address", "add", f"{LATER}/32", "dev", "lo"]
    return REACH.replace(
        "for target",
        "import re, subprocess, time\n"
        f"subprocess.run({add!r}, check=True)\n"
        # Whole: the address of another run may begin with this one.
        f"def known(): return re.search(rb'\\b{LATER}\\b', subprocess.check_output(['nft', 'list', 'ruleset']))\n"
        "while not known(): time.sleep(0.01)\n"
        "for target",
    )


@pytest.fixture
def removed_later() -> Iterator[None]:
    yield
    subprocess.run(["ip", "address", "del", f"{LATER}/32", "dev", "lo"], check=False)


@pytest.mark.usefixtures("removed_later")
def test_an_address_that_the_host_gets_later_is_refused_too(in_network):
    with echoing(_TCP, "0.0.0.0") as port:
        found = reached(in_network(reach_later(in_network), f"{LATER},{port}", f"{LATER},{port},eth0"))
    assert all(what.startswith("blocked") for what in found.values()), found


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_chosen_port_of_the_host_is_reached_at_both_loopback_addresses(in_network, host):
    kind = _IPv6 if ":" in host else _TCP
    with echoing(kind, host) as port:
        spec = PoolSpec.model_validate({"networking": {"hostPorts": [port]}})
        found = reached(in_network(REACH, f"127.0.0.1,{port}", f"::1,{port}", spec=spec))
    assert found == {f"127.0.0.1,{port}": "hello", f"::1,{port}": "hello"}


RESOLVE = f"""
import socket, sys, time

def ask(kind):
    with socket.socket(socket.AF_INET, kind) as s:
        s.settimeout(5)  # a resolver asks again then (resolv.conf(5)): a query without a free place gets no answer
        s.connect(("{worker_init.NAMESERVER}", 53))
        s.sendall(bytes.fromhex(sys.argv[1]))
        return s.recv(100).hex()

print("resolv.conf", repr(open("/etc/resolv.conf").read()))
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    for _ in range(100):  # the relay may still be busy with those who asked before
        try:
            print(kind.name, ask(kind))
            break
        except (ConnectionError, TimeoutError):
            time.sleep(0.05)
"""


def test_names_are_asked_of_the_hosts_own_resolver_on_loopback(in_network):
    with (
        echoing(_UDP, RESOLVER, 53),
        echoing(_TCP, RESOLVER, 53),
    ):
        found = reached(in_network(RESOLVE, QUERY.hex()))
    assert found == {
        "resolv.conf": repr(f"nameserver {worker_init.NAMESERVER}\nsearch corp\n"),
        "SOCK_DGRAM": QUERY.hex(),
        "SOCK_STREAM": QUERY.hex(),
    }


HELD_FLOOD = f"""
import resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
held = []
for number in range(200):
    s = socket.socket()
    s.settimeout(0.05)
    try:
        s.connect(("{worker_init.NAMESERVER}", 53))
        held.append(s)
    except OSError:
        pass
"""
FLOOD = f"{HELD_FLOOD}for s in held: s.close()"


def test_a_build_that_uses_up_the_relays_descriptors_leaves_it_to_the_next_one(in_network):
    few = ["prlimit", "--nofile=64:4096"]  # pasta and the flood raise theirs
    with (
        echoing(_UDP, RESOLVER, 53),
        echoing(_TCP, RESOLVER, 53),
    ):
        command = [*few, *in_network.command(f"{FLOOD}\n{RESOLVE}", QUERY.hex())]
        found = reached(subprocess.run(command, capture_output=True, text=True, timeout=300, check=False))
    assert (found["SOCK_DGRAM"], found["SOCK_STREAM"]) == (QUERY.hex(), QUERY.hex())


@pytest.mark.usefixtures("removed_later")
def test_a_flood_of_the_relay_does_not_keep_a_new_address_of_the_host_reachable(in_network):
    with echoing(_TCP, "0.0.0.0") as port, echoing(_TCP, RESOLVER, 53):
        program = HELD_FLOOD + reach_later(in_network)
        command = ["prlimit", "--nofile=64:4096", *in_network.command(program, f"{LATER},{port}")]
        found = reached(subprocess.run(command, capture_output=True, text=True, timeout=300, check=False))
    assert found[f"{LATER},{port}"].startswith("blocked"), found


def test_no_descriptor_for_a_file_of_the_kernel_ends_the_worker():
    """An empty list of the host's addresses would open them to its builds."""
    program = """if True:
        import resource
        from bkpool.workers.processes.worker_init.kernel import read
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        read("/proc/net/fib_trie")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == worker_init.FAILED
    assert done.stderr == "the worker's network: /proc/net/fib_trie cannot be read: Too many open files\n"


def test_a_build_that_takes_every_inotify_instance_stops_no_other_worker(in_network):
    """The limit is set in a user namespace, so that nobody else on this machine misses them."""
    none_left = 'echo 0 >/proc/sys/user/max_inotify_instances && exec "$0" "$@"'
    with echoing(_UDP, RESOLVER, 53), echoing(_TCP, RESOLVER, 53):
        namespace = ["unshare", "--user", "--map-root-user", "sh", "-c", none_left]
        command = [*namespace, *in_network.command(RESOLVE, QUERY.hex())]
        found = reached(subprocess.run(command, capture_output=True, text=True, timeout=300, check=False))
    assert (found["SOCK_DGRAM"], found["SOCK_STREAM"]) == (QUERY.hex(), QUERY.hex())


PEER = """
ip link set lo up
touch {0}/peer && unshare --net={0}/peer true
ip link add here type veth peer name there && ip link set there netns {0}/peer
ip link set here up
peer="nsenter --net={0}/peer"
$peer ip link set lo up && $peer ip link set there up
{1}
$peer {2} -c '
import socketserver
class Peer(socketserver.BaseRequestHandler):
    def handle(self): self.request.recv(100) and self.request.sendall(b"peer")
class Server(socketserver.ThreadingTCPServer):
    address_family = socketserver.socket.AF_INET6
    daemon_threads = True
server = Server(("::", 8000), Peer)
print("listening", flush=True)
server.serve_forever()' > {0}/peer.log 2>/dev/null &
until grep -q listening {0}/peer.log; do :; done
"""
IPV4 = "ip address add 10.9.9.1/24 dev here; $peer ip address add 10.9.9.2/24 dev there"
IPV6 = "ip address add fd09::1/64 dev here nodad; $peer ip address add fd09::2/64 dev there nodad"


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (IPV4, {"10.9.9.2,8000": "peer"}),  # no default route: an isolated network
        (f"{IPV4}; ip route add default via 10.9.9.2", {"10.9.9.2,8000": "peer"}),
        (f"{IPV6}; ip -6 route add default via fd09::2", {"fd09::2,8000": "peer"}),
        (
            f"{IPV4}; {IPV6}; ip route add default via 10.9.9.2; ip -6 route add default via fd09::2",
            {"10.9.9.2,8000": "peer", "fd09::2,8000": "peer"},
        ),
    ],
)
def test_what_the_host_reaches_the_worker_reaches(in_network, tmp_path, setup, expected):
    host = PEER.format(tmp_path, setup, sys.executable)
    found = reached(in_network(REACH, *expected, "10.9.9.1,8000", host=host))
    assert {target: what for target, what in found.items() if target in expected} == expected
    assert found["10.9.9.1,8000"].startswith("blocked")


def test_a_host_without_a_network_has_workers_too(in_network):
    assert reached(in_network(REACH, "10.9.9.2,8000", host="ip link set lo up"))["10.9.9.2,8000"].startswith(
        "blocked"
    )


def test_the_exit_code_and_the_output_are_those_of_the_program(in_network):
    answer = in_network("import os, sys; print('out'); print('err', file=sys.stderr); os._exit(37)")
    assert (answer.returncode, answer.stdout, answer.stderr) == (37, "out\n", "err\n")
    killed = in_network("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == 128 + 9


def test_a_worker_ends_with_its_connection(in_network):
    """Better no worker than one that nothing works in."""
    kill = "import os, signal, subprocess, time\nos.system('pkill -9 pas')\ntime.sleep(60)"
    answer = in_network(kill)
    assert answer.returncode == worker_init.FAILED
    assert "pasta ended" in answer.stderr


def test_nothing_is_left_whenever_it_is_killed(in_network, tmp_path):
    in_network("pass")  # so that its files are there
    command, nowhere = in_network.command("import time; time.sleep(60)"), subprocess.DEVNULL
    for milliseconds in range(0, 120, 8):
        with subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True) as started:
            select.select([], [], [], milliseconds / 1000)
            # The whole group, as bkpool does. `unshare` alone can be killed between its fork and the child's wish to
            # be killed with it.
            os.killpg(started.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (left := traces(tmp_path)) and time.monotonic() < deadline:
        select.select([], [], [], 0.02)
    assert left == []


def traces(directory: Path) -> list[str]:
    """The processes and the mounts that belong to this directory. Without them the kernel keeps no namespace."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in command:
                found.append(command)
    return found
