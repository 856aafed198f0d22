"""The places of a worker's relay, with real sockets and without a network namespace."""

from __future__ import annotations

import socket
import threading

from bkpool.workers.processes.worker_init import relays
from bkpool.workers.processes.worker_init.relays import Relays


class NoNamespace:
    def inside(self, work):
        """Opens nothing: a test brings its own connections."""


def test_a_server_that_never_ends_keeps_no_place(monkeypatch):
    monkeypatch.setattr(relays, "_LINGER_SECONDS", 0.05)
    relay = Relays(NoNamespace(), [], list)
    client, ours = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        assert relay._begin(relay._relay, ours, lambda: [silent.getsockname()])
        taken = relay._free._value
        connection, _ = silent.accept()
        client.close()
        with connection:
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and thread.daemon and "_relay" in thread.name:
                    thread.join(60)
            assert relay._free._value == taken + 1
    relay._queries.close()
