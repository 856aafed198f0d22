"""The first process of a worker: gives it a network of its own, starts buildkitd in there, and ends with it.

It is a program of its own with the standard library alone, because it is in memory once for each worker.
`InitProgram` copies this package beside the sockets and runs it with `python -I -S`. It runs in the host's network
and in the other namespaces of the worker, and so do pasta and nft, which it starts. When it ends, all of them end,
and the kernel removes the network with everything in it. It decides nothing: its settings have the rules and ports.
"""

from __future__ import annotations

from typing import TypedDict

NAMESERVER = "198.19.255.53"
"""Where a worker's processes find the relay to the host's name servers. It is on the worker's own loopback interface,
and not in 127.0.0.0/8, because BuildKit removes such name servers from resolv.conf and asks 8.8.8.8 instead. The
network 198.18.0.0/15 is for benchmarks (RFC 2544); its first half is in use by some VPN clients."""

FAILED = 70
"""The exit code if the network cannot be made or has ended: EX_SOFTWARE of sysexits.h."""


class CgroupMount(TypedDict):
    """A hierarchy of cgroups that a worker needs in its mount namespace."""

    target: str
    kind: str
    """`cgroup` or `cgroup2`."""
    options: str
    """As of mount(8), without flags."""


class MountSettings(TypedDict):
    """What a worker of root sees differently from the host."""

    home: str
    """The directory that root has as home."""
    cgroups: list[CgroupMount]
    """What replaces /sys/fs/cgroup; empty: it stays."""


class NetworkSettings(TypedDict):
    """What the appliance wants of a worker's network."""

    pasta: str
    """The program, as an absolute path."""
    nft: str
    netns_directory: str
    """An empty directory, on which a tmpfs is mounted that only this worker sees."""
    resolv_conf: str
    """A file to make, for the worker's /etc/resolv.conf."""
    rules: str
    """The packet filter for nft, with empty sets host4 and host6 for the addresses of the host."""
    ready: str
    """A file to make when the network is complete."""
    host_ports: list[int]
    """TCP ports of the worker's loopback addresses that lead to the same port of the host's."""


class WorkerSettings(TypedDict):
    """What the appliance wants of a worker."""

    mounts: MountSettings | None
    """None: the worker is not root's."""
    network: NetworkSettings | None
    """None: the worker uses the host's network."""
