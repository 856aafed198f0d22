"""The network namespace of a worker: made with a packet filter, and connected with the host by pasta.

What is decided about it is in the settings. It is never left without its filter.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import NAMESERVER, NetworkSettings
from .host_facts import host_rules, local_networks, outer_interface
from .kernel import CLONE_NEWNET, MS_BIND, T, checked, expect_success, in_thread, libc, read, spawn

_MTU = 65520  # bytes, the most that pasta can. The host's own sockets cut for the real route; 1500 is 8 times slower
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B  # netdevice(7)
_SIOCSIFADDR, _SIOCSIFFLAGS, _SIOCSIFNETMASK, _IFF_UP = 0x8916, 0x8914, 0x891C, 1  # netdevice(7)


class WorkerNetwork:
    """The worker's network namespace.

    Args:
        settings: What it shall be.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        self._settings = settings
        directory = settings["netns_directory"]
        checked(libc.mount(b"bkpool", directory.encode(), b"tmpfs", 0, b"mode=700"), directory)
        self._path = Path(directory, "net")
        self._path.touch()
        in_thread(self._make)
        self._namespace = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._refused: tuple[list[str], list[str]] | None = None
        self.pasta: int | None = None
        """The process id of pasta; None: the host has no network."""

    def refuse_host(self, rules: str = "") -> None:
        """Makes the packet filter know the host's present addresses. Does nothing if they have not changed.

        Args:
            rules: What is given to nft before: the filter itself.
        """
        networks = local_networks(
            read("/proc/net/fib_trie"), read("/proc/net/if_inet6"), read("/proc/net/ipv6_route")
        )
        if networks == self._refused:
            return
        reading, writing = os.pipe()
        child = self.spawn([self._settings["nft"], "-f", "-"], stdin=reading)
        os.close(reading)
        with suppress(BrokenPipeError), os.fdopen(writing, "w") as rules_for_nft:
            rules_for_nft.write(rules + host_rules(*networks))
        expect_success(child, "nft")
        self._refused = networks

    def connect_to_host(self) -> None:
        """Starts pasta, unless it runs or the host has no network. It returns when the connection works."""
        found = outer_interface(read("/proc/net/route"), read("/proc/net/ipv6_route"))
        if self.pasta is not None or found is None:
            return
        interface, has_default_route = found
        # Nothing but connections from the namespace to elsewhere: no ports, and no address that means the host.
        command = [self._settings["pasta"], "--quiet", "--runas=0", "--config-net", "--no-map-gw", "--no-dhcp"]
        command += ["--no-dhcpv6", "--no-ra", "--dns=none", "--tcp-ports=none", "--udp-ports=none", "--tcp-ns=none"]
        command += ["--udp-ns=none", "--ns-ifname=eth0", f"--interface={interface}"]
        command += [] if has_default_route else _addresses_of(interface)
        command += [f"--mtu={_MTU}", "--netns-only", f"--netns={self._path}"]
        before = _pastas()
        expect_success(spawn(command), "pasta")  # it goes on in the background, as a child of ours
        self.pasta = next(iter(_pastas() - before), None)

    def spawn(self, command: list[str], *, stdin: int | None = None) -> int:
        """Starts a program in the namespace. Returns its process id."""
        return self.inside(lambda: spawn(command, stdin))

    def inside(self, work: Callable[[], T]) -> T:
        """Does something in the namespace. What is made there stays in there: sockets and programs."""

        def enter_and_work() -> T:
            checked(libc.setns(self._namespace, CLONE_NEWNET), "a thread in the network namespace")
            return work()

        return in_thread(enter_and_work)

    def _make(self) -> None:
        """Makes the namespace, which has a name from then on and stays without a process in it."""
        checked(libc.unshare(CLONE_NEWNET), "a network namespace")
        made = libc.mount(b"/proc/thread-self/ns/net", bytes(self._path), None, MS_BIND, None)
        checked(made, str(self._path))
        _set_up_loopback()


def _set_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
        for request, address in ((_SIOCSIFADDR, NAMESERVER), (_SIOCSIFNETMASK, "255.255.255.255")):
            packed = struct.pack("16sHH4s8x", b"lo:dns", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(control, request, packed)


def _addresses_of(interface: str) -> list[str]:
    """What pasta must be told where there is no default route: it finds no address without one.

    The gateway in the worker only has to be another address of the same network. Nothing is sent to it.
    """
    name = struct.pack("256s", interface.encode())
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            address, mask = (
                fcntl.ioctl(control, request, name)[20:24] for request in (_SIOCGIFADDR, _SIOCGIFNETMASK)
            )
    except OSError:  # it has no address of its own; pasta says what it misses
        return []
    gateway = socket.inet_ntoa(address[:3] + bytes([address[3] ^ 1]))
    own = [f"--address={socket.inet_ntoa(address)}", f"--netmask={socket.inet_ntoa(mask)}"]
    return ["--ipv4-only", *own, f"--gateway={gateway}"]


def _pastas() -> set[int]:
    """The pasta processes among our children."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            name, _, rest = read(f"{entry}/stat").partition("(")[2].rpartition(")")
            if name.startswith("pas") and int(rest.split()[1]) == os.getpid():
                found.add(int(entry.name))
    return found
