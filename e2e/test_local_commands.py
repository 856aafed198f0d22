"""The commands of a machine and its appliance, while somebody listens in on loopback or in the appliance's place."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import pytest

from harness import WAIT_TIMEOUT, Appliance, only_on

pytestmark = only_on("process", "the commands reach an appliance of this machine in the same way on every backend")

_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_EVERY_PROTOCOL = 0x0003  # ETH_P_ALL of packet(7)
_SO_RCVBUFFORCE = 33  # socket(7); SO_RCVBUF gives root no more than it gives others
_BUFFER = 64 << 20  # bytes: other programs use loopback, too


@pytest.fixture(scope="module")
def appliance(tmp_path_factory, tools, world) -> Iterator[Appliance]:
    appliance = Appliance(tmp_path_factory.mktemp("local"), tools, world=world)
    appliance.up_with({})
    yield appliance
    appliance.finish()


class Sniffer:
    """Everything that crosses loopback, as a packet socket there hears it until the end of a `with` block."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._socket.bind(("lo", 0))
        self._end = secrets.token_bytes(16)
        self._received: list[bytes] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._socket.close()

    def received(self) -> bytes:
        """Ends listening, and returns what was received. Fails if a packet was lost."""
        self._stop()
        _, lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert not lost, f"{lost} packets were lost"
        return b"".join(self._received)

    def _stop(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            while self._thread.is_alive():
                last.sendto(self._end, ("127.0.0.1", 9))
                self._thread.join(0.1)

    def _listen(self) -> None:
        while self._end not in (packet := self._socket.recv(1 << 17)):
            self._received.append(packet)


@contextmanager
def listener(address: str, port: int) -> Iterator[socket.socket]:
    """Somebody who listens, and would keep a client waiting."""
    with socket.create_server((address, port), family=socket.AF_INET6) as server:
        server.setblocking(False)
        yield server


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen in on loopback")
def test_no_command_sends_a_token_over_loopback_in_clear(appliance: Appliance) -> None:
    admin = (appliance.home / "admin.token").read_bytes().strip()
    with Sniffer() as sniffer:
        appliance.cli("status").ok()
        lease = appliance.cli("allocate").ok().json
        appliance.cli("status", BKCTL_ENDPOINT=f"http://localhost:{appliance.ports['api']}").ok()
        appliance.release(lease).ok()
        received = sniffer.received()
    assert admin not in received
    assert lease["token"].encode() not in received

    with Sniffer() as sniffer:  # the attack itself works: the port is in clear for those who use it
        assert appliance.http("GET", "/api/v1/pools")[0] == 200
        assert admin in sniffer.received()


def test_a_listener_on_the_other_loopback_address_is_not_called(appliance: Appliance) -> None:
    if not os.path.exists("/proc/net/if_inet6"):  # noqa: PTH110 - a question, not a path of ours
        pytest.skip("this machine has no IPv6")
    port = appliance.ports["api"]
    token = (appliance.home / "admin.token").read_text().strip()
    with listener("::1", port) as stranger:
        appliance.cli("status").ok()
        appliance.cli("status", BKCTL_ENDPOINT=f"http://localhost:{port}").ok()
        appliance.cli("status", BKCTL_ENDPOINT=f"localhost:{port}", BKCTL_TOKEN=token).ok()
        with pytest.raises(BlockingIOError):
            stranger.accept()


def test_another_endpoint_is_not_sent_the_admins_token(appliance: Appliance) -> None:
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(WAIT_TIMEOUT)

        def hear() -> None:
            connection, _ = stranger.accept()
            with connection:
                received.append(connection.recv(65536))

        thread = threading.Thread(target=hear)
        thread.start()
        answer = appliance.cli("status", BKCTL_ENDPOINT=f"http://127.0.0.1:{stranger.getsockname()[1]}")
        thread.join()
    assert answer.code != 0
    assert received[0].startswith(b"GET /api/v1/pools ")
    assert b"Authorization" not in received[0]
