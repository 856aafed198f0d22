"""What is done to a proxy, how much of it, and which figure it gives; and one measurement of one load.

The client program makes the load and times it, the kernel says what the proxy spent. A proxy is started afresh for
each measurement, so that no load finds the memory of the one before.
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
_OTHERS = 200  # descriptors that are no connection's


@dataclass(frozen=True)
class Sizes:
    """How much of each load."""

    transfer: int = 2_000_000_000
    """Bytes, in all."""
    trips: int = 20_000
    connections: int = 2_000
    idle: int = 5_000

    @property
    def at_once(self) -> int:
        """Connections that a proxy must bear."""
        return self.idle + _MANY + 64


SMOKE = Sizes(transfer=40_000_000, trips=500, connections=100, idle=200)


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    seconds: float
    """That the load took."""
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
    """What TLS came to between client and proxy."""
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
    """The client's word for it; the name, where there is none."""
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
"""The cores of the proxy, and those of the client."""


@dataclass(frozen=True)
class Ground:
    """What all measurements share: certificates, the load client, and the worker that listens behind the proxies."""

    directory: Path
    """For whatever is written."""
    pki: Pki
    socket: Path
    """The worker in the clear."""
    worker_port: int
    """The worker over TLS."""
    client: Path
    """The program."""
    sizes: Sizes

    def measure(
        self, peer: Peer, leg: str, load: Load, *, workers: int = 1, leases: int = 1, pinned: Pinned | None
    ) -> Sample:
        """One load through a proxy that has just been started.

        Args:
            peer: The proxy.
            leg: How it goes on to the worker, one of LEGS.
            load: What is done to it.
            workers: Processes, threads or loops that share the proxy's work.
            leases: Over how many leases the connections are spread.
            pinned: None leaves it to the kernel where they run.

        Raises:
            FaultError: It could not be measured, and why.
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
            greeting = json.loads(client.hear())
            cpu, memory = proxy.cpu(), proxy.resident()
            client.say()
            result = json.loads(client.hear())
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
    """The worker behind the proxies, and what they need.

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
        sink.hear()
        yield Ground(directory, pki, socket, port, client, sizes)


@contextmanager
def _ended_if_it_hangs(client: Program) -> Iterator[None]:
    timer = threading.Timer(_HANGS_AFTER, client.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
