"""Puts the parts together and waits for the end of the worker. It is the reaper of its PID namespace."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from . import WorkerSettings
from .kernel import background, checked, fail, libc, spawn
from .mounts import mount_all
from .namespace import WorkerNetwork
from .relays import Relays
from .resolver import HostResolver

_PR_SET_CHILD_SUBREAPER = 36  # prctl.h
_RTMGRP = 0x10 | 0x40 | 0x100 | 0x400  # rtnetlink(7): addresses and routes, of IPv4 and IPv6


def main(worker: WorkerSettings, command: list[str]) -> int:
    """Runs a command with the mounts and the network of the settings. Returns its exit code."""
    settings = worker["network"]
    if worker["mounts"]:
        mount_all(worker["mounts"])
    checked(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "a reaper")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    if settings is None:
        return _serve(spawn(command), reading, None)
    changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    changes.bind((0, _RTMGRP))  # before the addresses are read, so that no change is missed
    network = WorkerNetwork(settings)
    # It starts while the network is made, which takes as long. Until then it has nothing but its own loopback.
    child = network.spawn(command)
    network.refuse_host(settings["rules"])
    network.connect_to_host()
    resolver = HostResolver(Path(settings["resolv_conf"]))
    relays = Relays(network, settings["host_ports"], lambda: resolver.servers)
    relays.start()
    background(resolver.follow)
    Path(settings["ready"]).touch()
    return _serve(child, reading, (changes, network))


def _serve(command: int, children: int, following: tuple[socket.socket, WorkerNetwork] | None) -> int:
    """Reaps every process and follows the host's addresses, until the command has ended.

    Args:
        command: Its process id.
        children: A descriptor that can be read when a process has ended.
        following: Tells of changes of the host's addresses and routes; and what must know them.

    Returns:
        The exit code, for a signal as a shell does.
    """
    changes, network = following or (None, None)
    watched: list[int | socket.socket] = [children, *([changes] if changes else [])]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if changes and network and changes in ready:
            with suppress(OSError):  # there were more changes than fit into its buffer
                changes.recv(65536)
            try:
                network.refuse_host()
                network.connect_to_host()
            except (OSError, RuntimeError) as error:  # a build has used up the processes, for example
                fail(f"the packet filter cannot follow the host's addresses: {error}")
        if children in ready:
            os.read(children, 4096)
        for pid, code in _ended():
            if pid == command:
                return code if code >= 0 else 128 - code
            if network and pid == network.pasta:
                fail(f"pasta ended with exit code {code}")


def _ended() -> Iterator[tuple[int, int]]:
    """The processes that have ended and were not reaped yet, with their exit codes."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


def run() -> NoReturn:
    """The program. Its arguments are the file of the settings and the command, whose exit code it ends with."""
    os.environ.pop("LC_CTYPE", None)  # Python sets it, where a system has no locale (PEP 538)
    code = main(json.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2:])
    os._exit(code)  # at once: threads that wait for a connection have nothing to finish
