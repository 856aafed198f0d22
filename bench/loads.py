"""The loads of a proxy, their size and the figure of each, and the measurement of one load.

The client program makes the load and measures its time. The kernel counts the CPU time of the proxy. Each measurement
starts a new proxy, so that the memory of an earlier load does not count.
"""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import programs
from bench.certificates import Pki
from bench.peers import Peer, Place, running
from bench.process import FaultError, Program, free_port

_MANY = 64
_HANGS_AFTER = 300.0  # seconds; a load takes a few
_OTHERS = 200  # descriptors that are not for connections


@dataclass(frozen=True)
class Sizes:
    """The size of each load."""

    transfer: int = 2_000_000_000
    """Bytes, in all."""
    trips: int = 20_000
    connections: int = 2_000
    idle: int = 5_000

    @property
    def at_once(self) -> int:
        """The most connections that a proxy must hold at once."""
        return self.idle + _MANY + 64


SMOKE = Sizes(transfer=40_000_000, trips=500, connections=100, idle=200)


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    seconds: float
    """Seconds of the load."""
    moved: int
    """Bytes."""
    count: int
    """Round trips or connections."""
    median: float
    """Seconds of a round trip."""
    cpu: float
    """Seconds of processor time that the proxy spent."""
    memory: int
    """Bytes by which the proxy grew."""
    cipher: str
    """The cipher that client and proxy agreed on."""
    tickets: int
    """Sessions that the proxy offered on one connection."""


@dataclass(frozen=True)
class Load:
    """One load and the figure it gives."""

    name: str
    title: str
    unit: str
    figure: Callable[[Sample], float]
    more_is_better: bool = True
    kind: str = ""
    """The client program's name for the load; by default `name`."""
    streams: int = 1
    both_ways: bool = False

    def arguments(self, sizes: Sizes) -> list[str]:
        """For the client."""
        count = {"pingpong": sizes.trips, "idle": sizes.idle}.get(self.name, sizes.connections)
        each_way = sizes.transfer // (2 if self.both_ways else 1)
        words = [f"-load={self.kind or self.name}", f"-streams={self.streams}", f"-bytes={each_way}"]
        return [*words, f"-count={count}"]


def _gigabytes_a_second(sample: Sample) -> float:
    return sample.moved / 1e9 / sample.cpu


def _round_trip(sample: Sample) -> float:
    return sample.median * 1e6


def _connections_a_second(sample: Sample) -> float:
    return sample.count / sample.cpu


def _memory(sample: Sample) -> float:
    return sample.memory / 1024 / sample.count


_BYTES = ("GB per CPU-second", _gigabytes_a_second)
LOADS = {
    load.name: load
    for load in (
        Load("up", "to the worker, 1 stream", *_BYTES),
        Load("down", "from the worker, 1 stream", *_BYTES),
        Load("up64", f"to the worker, {_MANY} streams", *_BYTES, kind="up", streams=_MANY),
        Load("down64", f"from the worker, {_MANY} streams", *_BYTES, kind="down", streams=_MANY),
        Load("duplex", "both ways at once, 1 stream", *_BYTES, both_ways=True),
        Load("records", "records of 16 KiB ± 1 byte", *_BYTES),
        Load("messages", "chunks of 48 KiB, each answered, 4 under way", *_BYTES),
        Load(
            "connections",
            "full mTLS connections, each with a dial and an echo",
            "per CPU-second",
            _connections_a_second,
        ),
        Load("pingpong", "round trip of 1 byte, median", "µs", _round_trip, more_is_better=False),
        Load("idle", "memory of an idle connection", "KiB", _memory, more_is_better=False),
    )
}


Pinned = tuple[set[int], set[int]]
"""The cores of the proxy and the cores of the client."""


@dataclass(frozen=True)
class Ground:
    """What all measurements share: certificates, the load client, and the worker behind the proxies."""

    directory: Path
    """The directory for all files."""
    pki: Pki
    socket: Path
    """The worker without TLS."""
    worker_port: int
    """The worker with TLS."""
    client: Path
    """The program."""
    sizes: Sizes

    def measure(
        self, peer: Peer, leg: str, load: Load, *, workers: int = 1, leases: int = 1, pinned: Pinned | None
    ) -> Sample:
        """Measures one load through a new proxy.

        Args:
            peer: The proxy.
            leg: The connection from proxy to worker, one of LEGS.
            load: The load.
            workers: The number of processes, threads or loops of the proxy.
            leases: The number of leases of the connections.
            pinned: The cores to use; None lets the kernel choose them.

        Raises:
            FaultError: The load could not be measured; the message has the reason.
        """
        (self.directory / peer.name).mkdir(exist_ok=True)
        place = Place(
            self.directory / peer.name, self.pki, leg, self.socket, self.worker_port, self.sizes.at_once, workers
        )
        proxy_on, client_on = pinned or (None, None)
        words = [f"-address=127.0.0.1:{place.port}", f"-pki={self.pki.directory}", f"-leases={leases}"]
        command: list[str | Path] = [self.client, *words, *load.arguments(self.sizes)]
        with (
            running(peer, place, proxy_on) as proxy,
            Program(command, self.directory / "client.log", on=client_on, talks=True) as client,
            _ended_if_it_hangs(client),
        ):
            greeting = json.loads(client.read_line())
            cpu, memory = proxy.cpu(), proxy.resident()
            client.write_line()
            result = json.loads(client.read_line())
            return Sample(
                seconds=result["seconds"],
                moved=result["bytes"],
                count=result["count"],
                median=result["median"],
                cpu=proxy.cpu() - cpu,
                memory=proxy.resident() - memory,
                cipher=f"{greeting['cipher']} with {greeting['curve']}",
                tickets=greeting["tickets"],
            )


@contextmanager
def ground(directory: Path, pki: Pki, sizes: Sizes, on: set[int] | None) -> Iterator[Ground]:
    """Starts the worker behind the proxies and prepares what they need.

    Raises:
        FaultError: The load client cannot be built, or the system has too few descriptors.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2 * sizes.at_once + _OTHERS:
        raise FaultError(f"{sizes.idle} idle connections need {2 * sizes.at_once + _OTHERS} descriptors: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    client, socket, port = programs.load(), directory / "worker", free_port()
    command: list[str | Path] = [client, f"-sink={socket}", f"-address=127.0.0.1:{port}", f"-pki={pki.directory}"]
    with Program(command, directory / "sink.log", on=on, talks=True) as sink:
        sink.read_line()
        yield Ground(directory, pki, socket, port, client, sizes)


@contextmanager
def _ended_if_it_hangs(client: Program) -> Iterator[None]:
    timer = threading.Timer(_HANGS_AFTER, client.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
