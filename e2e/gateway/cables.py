"""Two machines with cables between them that can be cut: network namespaces that end with the test's threads.

The machine's own network is not changed: the namespaces have no names, and no route to it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

CLONE_NEWNET = 0x40000000  # linux/sched.h

_libc = ctypes.CDLL(None, use_errno=True)


def _unshare() -> None:
    if _libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "making a network namespace needs root")


class Machine:
    """A network namespace. `call` runs a function in it. Sockets and threads that are made there stay there."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=_unshare)
        self.ip("link set lo up")

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._thread.submit(function, *arguments).result()

    def ip(self, command: str) -> None:
        self.call(lambda: subprocess.run(["ip", *command.split()], check=True, capture_output=True))

    def enter(self) -> None:
        """Moves the calling thread, and every thread that it starts later, to this machine."""
        descriptor = os.open(f"/proc/{self.call(threading.get_native_id)}/ns/net", os.O_RDONLY)
        _enter_namespace(descriptor)

    def end(self) -> None:
        self._thread.shutdown()


def _enter_namespace(descriptor: int) -> None:
    try:
        if _libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter a network namespace")
    finally:
        os.close(descriptor)


@contextmanager
def inside(machine: Machine) -> Iterator[None]:
    """Moves the calling thread to this machine until the end of the block."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    machine.enter()
    try:
        yield
    finally:
        _enter_namespace(before)


class Cable:
    """A link between two machines."""

    def __init__(self, near: Machine, far: Machine, number: int) -> None:
        self.near, self.far = f"10.77.{number}.1", f"10.77.{number}.2"
        self._name, self._machine = f"far{number}", far
        near.ip(f"link add near{number} type veth peer name far{number}")
        near.ip(f"link set far{number} netns {far.call(threading.get_native_id)}")
        for machine, name, address in ((near, f"near{number}", self.near), (far, self._name, self.far)):
            machine.ip(f"addr add {address}/30 dev {name}")
            machine.ip(f"link set {name} up")

    def cut(self) -> None:
        """Loses every packet from now on, without an error on either side."""
        self._machine.ip(f"link set {self._name} down")
