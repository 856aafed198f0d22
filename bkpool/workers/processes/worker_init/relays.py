"""Leads DNS and the chosen ports from a worker to its host. It understands nothing of what it passes on."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from . import NAMESERVER
from .kernel import background
from .namespace import WorkerNetwork

_CONNECTIONS = 512  # relayed at once for one worker, and DNS queries; more are refused
_RESERVED = 16  # descriptors that connections leave to the packet filter and the resolver
_DNS_SECONDS = 2.0  # for one name server; clients wait 5 s by default (resolv.conf(5))
_PAUSE = 0.1  # seconds before the next try when the kernel has given nothing
_LINGER_SECONDS = 60.0  # for the answer after the client has ended its side; or a silent server would keep a place
_LISTEN_SECONDS = 10.0  # until the host's port must have accepted


class Relays:
    """Leads DNS and the chosen ports from the worker to the host. Each connection has two threads.

    Args:
        network: The worker's.
        host_ports: See `NetworkSettings`.
        resolver: Says which name servers the host has now.
    """

    def __init__(
        self, network: WorkerNetwork, host_ports: Iterable[int], resolver: Callable[[], Sequence[str]]
    ) -> None:
        self._resolver = resolver
        self._queries = socket.socket()
        self._listeners: list[tuple[socket.socket, Callable[[], list[tuple[str, int]]]]] = []
        network.inside(lambda: self._open(host_ports))
        self._free = threading.BoundedSemaphore(_places(len(self._listeners)))

    def start(self) -> None:
        """Relays in the background."""
        background(self._answer_queries)
        for listener, targets in self._listeners:
            background(self._accept, listener, targets)

    def _open(self, host_ports: Iterable[int]) -> None:
        self._queries = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._queries.bind((NAMESERVER, 53))
        self._listeners.append((_listen(socket.AF_INET, NAMESERVER, 53), self._dns_targets))
        for port in host_ports:
            targets = _loopback_targets(port)
            self._listeners.append((_listen(socket.AF_INET, "127.0.0.1", port), targets))
            with suppress(OSError):  # the kernel has no IPv6
                self._listeners.append((_listen(socket.AF_INET6, "::1", port), targets))

    def _dns_targets(self) -> list[tuple[str, int]]:
        return [(server, 53) for server in self._resolver()]

    def _answer_queries(self) -> None:
        while True:
            try:
                query, client = self._queries.recvfrom(65535)
            except OSError:
                time.sleep(_PAUSE)
            else:
                self._begin(self._answer, query, client)

    def _answer(self, query: bytes, client: tuple[str, int]) -> None:
        try:
            for server in self._resolver():
                with suppress(OSError), _socket_for(server, socket.SOCK_DGRAM) as upstream:
                    upstream.settimeout(_DNS_SECONDS)
                    upstream.connect(_address(server, 53))  # so that an answer from elsewhere is not taken
                    upstream.send(query)
                    self._queries.sendto(upstream.recv(65535), client)
                    return
        finally:
            self._free.release()

    def _accept(self, listener: socket.socket, targets: Callable[[], list[tuple[str, int]]]) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # a build has used up the descriptors; the client waits
                time.sleep(_PAUSE)
            else:
                if not self._begin(self._relay, client, targets):
                    client.close()

    def _begin(self, work: Callable[..., None], *arguments: object) -> bool:
        """Starts a thread, unless there are too many or a build has used up the worker's processes.

        Returns:
            Whether it was started. Whatever a build does, the relay serves the next one.
        """
        if not self._free.acquire(blocking=False):
            return False
        try:
            background(work, *arguments)
        except RuntimeError:
            self._free.release()
            return False
        return True

    def _relay(self, client: socket.socket, targets: Callable[[], list[tuple[str, int]]]) -> None:
        try:
            with client, _connected(targets()) as server:
                back = background(_copy, server, client)
                _copy(client, server)
                back.join(_LINGER_SECONDS)
                _cut(server, client)
                back.join()
        except (OSError, RuntimeError):
            pass  # nothing listens on the host, or no thread can be made: the client sees a closed connection
        finally:
            self._free.release()


def _places(listeners: int) -> int:
    """How many connections there may be at once. Each needs two descriptors, and one that is refused needs one.

    Args:
        listeners: How many accept connections at the same time.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _CONNECTIONS
    free = limit - len(list(Path("/proc/self/fd").iterdir())) - listeners - _RESERVED
    return min(max(free // 2, 1), _CONNECTIONS)


def _listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)
    return listener


def _loopback_targets(port: int) -> Callable[[], list[tuple[str, int]]]:
    return lambda: [("127.0.0.1", port), ("::1", port)]


def _connected(targets: Iterable[tuple[str, int]]) -> socket.socket:
    """A connection to the first of these that accepts."""
    for server, port in targets:
        upstream = _socket_for(server, socket.SOCK_STREAM)
        try:
            upstream.settimeout(_LISTEN_SECONDS)
            upstream.connect(_address(server, port))
            upstream.settimeout(None)
        except OSError:
            upstream.close()
        else:
            return upstream
    raise ConnectionRefusedError


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copies until the end of the stream, and ends the other stream then."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _cut(*connections: socket.socket) -> None:
    """Ends connections also for a thread that waits on them, which `close` does not."""
    for connection in connections:
        with suppress(OSError):  # it has ended already
            connection.shutdown(socket.SHUT_RDWR)


def _socket_for(address: str, kind: socket.SocketKind) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)


def _address(host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """A socket address. Nothing is looked up, except the interface in `fe80::1%eth0`."""
    if "%" not in host:
        return host, port
    address, _, interface = host.partition("%")
    return address, port, 0, socket.if_nametoindex(interface)
