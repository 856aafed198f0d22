"""The gateway's metrics: bytes are current and count once; the number of series is bounded."""

from __future__ import annotations

import asyncio
import threading

import pytest

from bkpool.core.names import Key
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.metrics import GatewayMetrics, Meter

P = Key("default", "p")


@pytest.fixture
def metrics():
    return GatewayMetrics()


@pytest.fixture
def value(metrics):
    def value(name, **labels):
        if "pool" in labels:
            labels.setdefault("pool_namespace", "default" if labels["pool"] else "")
        return metrics.registry.get_sample_value(f"buildkit_gateway_{name}", labels)

    return value


def _series(metrics, name):
    """Returns the samples of a metric, by their labels."""
    return {
        tuple(value for label, value in sample.labels.items() if label != "pool_namespace"): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"buildkit_gateway_{name}"
    }


def _meter(pool="p", worker="p-worker-0", up=0, down=0):
    end = PeerStream()
    end.bytes_in, end.bytes_out = up, down
    return Meter(Key("default", pool), worker, end)


def test_bytes_are_current_while_the_connection_is_open_and_count_once_after_its_end(metrics, value):
    meter = _meter()
    metrics.relay_started(meter)
    seen = []
    for up, down in ((0, 0), (10, 1), (10, 1), (25, 3)):
        meter.stream.bytes_in, meter.stream.bytes_out = up, down
        seen.append(
            (value("bytes_total", pool="p", direction="up"), value("bytes_total", pool="p", direction="down"))
        )
    meter.stream.bytes_in = 30
    metrics.relay_ended(meter, 1.0)
    assert seen == [(0, 0), (10, 1), (10, 1), (25, 3)]
    assert _series(metrics, "bytes_total") == {("p", "up"): 30, ("p", "down"): 3}
    metrics.relay_started(_meter(up=5))
    assert value("bytes_total", pool="p", direction="up") == 35


def test_the_busiest_workers_have_a_series_each_and_the_others_share_one():
    metrics = GatewayMetrics(worker_series=2)
    for number, count in enumerate((1, 3, 2, 1)):
        for _ in range(count):
            metrics.relay_started(_meter(worker=f"p-worker-{number}"))
    assert _series(metrics, "open_connections") == {("p", "p-worker-1"): 3, ("p", "p-worker-2"): 2, ("p", "other"): 2}


def test_the_byte_total_never_decreases_while_connections_come_and_go_in_other_threads(metrics, value):
    """The total is right at the end, and the gauges are zero."""

    def work():
        for _ in range(200):
            meter = _meter()
            metrics.count_pending(+1)
            metrics.relay_started(meter)
            metrics.count_pending(-1)
            meter.stream.bytes_in += 7
            metrics.relay_ended(meter, 0.1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen.append(value("bytes_total", pool="p", direction="up") or 0)
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert value("bytes_total", pool="p", direction="up") == 4 * 200 * 7
    assert value("connections_total", pool="p", status="success") == 800
    assert value("connection_duration_seconds_count", pool="p") == 800
    assert value("active_connections", pool="p") == value("pending_connections") == metrics.active(P) == 0


def test_active_counts_the_relayed_connections_of_a_pool(metrics, value):
    first, second = _meter(), _meter(pool="q")
    assert metrics.active(P) == 0
    metrics.relay_started(first)
    metrics.relay_started(second)
    assert metrics.active(P) == value("active_connections", pool="p") == 1
    metrics.relay_ended(first, 1.0)
    assert metrics.active(P) == value("active_connections", pool="p") == 0
    assert metrics.active(Key("default", "q")) == 1


def test_pools_of_one_name_in_two_namespaces_are_two(metrics, value):
    other = Key("team", "p")
    metrics.relay_started(_meter(up=3))
    metrics.relay_started(Meter(other, "p-worker-0", PeerStream()))
    metrics.relay_started(Meter(other, "p-worker-0", PeerStream()))
    metrics.refused(other, "LeaseExpired")
    metrics.dial_done(other, 0.1, "reached")
    assert (metrics.active(P), metrics.active(other)) == (1, 2)
    assert (metrics.active_by_worker(P), metrics.active_by_worker(other)) == ({"p-worker-0": 1}, {"p-worker-0": 2})
    for name, labels, ours, theirs in (
        ("active_connections", {}, 1, 2),
        ("open_connections", {"worker": "p-worker-0"}, 1, 2),
        ("bytes_total", {"direction": "up"}, 3, 0),
        ("connections_total", {"status": "success"}, 1, 2),
        ("refusals_total", {"reason": "LeaseExpired"}, None, 1),
        ("dial_seconds_count", {"outcome": "reached"}, None, 1),
    ):
        assert value(name, pool="p", **labels) == ours
        assert value(name, pool="p", pool_namespace="team", **labels) == theirs


def test_the_series_of_a_worker_disappears_when_nothing_is_open(metrics):
    meters = [_meter(worker="w-0"), _meter(worker="w-0"), _meter(worker="w-1")]
    for meter in meters:
        metrics.relay_started(meter)
    assert _series(metrics, "open_connections") == {("p", "w-0"): 2, ("p", "w-1"): 1}
    metrics.relay_ended(meters[2], 1.0)
    assert _series(metrics, "open_connections") == {("p", "w-0"): 2}
    for meter in meters[:2]:
        metrics.relay_ended(meter, 1.0)
    assert _series(metrics, "open_connections") == {}


def test_two_hundred_workers_have_a_series_each_and_the_others_share_one(metrics):
    """The busiest workers have a series each, and the sum is right."""
    for number in range(300):
        metrics.relay_started(_meter(worker=f"w-{number}"))
    busy = [f"w-{number}" for number in range(250, 300)]
    for worker in busy:
        metrics.relay_started(_meter(worker=worker))
    series = _series(metrics, "open_connections")
    assert len(series) == 201
    assert series["p", "other"] == 100
    assert [series["p", worker] for worker in busy] == [2] * 50
    assert sum(series.values()) == 350


def test_a_refusal_counts_as_an_error_of_its_pool_with_a_reason(metrics, value):
    metrics.refused(None, "TlsFailed")
    metrics.refused(P, "LeaseExpired")
    metrics.refused(P, "LeaseExpired")
    assert value("refusals_total", pool="p", reason="LeaseExpired") == 2
    assert value("connections_total", pool="p", status="error") == 2
    assert value("connections_total", pool="", status="error") == 1


def test_handshakes_and_dials_are_counted_by_outcome(metrics, value):
    metrics.handshake_done(0.004, ok=True)
    metrics.handshake_done(9.0, ok=False)
    metrics.dial_done(P, 0.0002, "reached")
    metrics.dial_done(P, 5.0, "failed")
    metrics.dial_done(P, 0.003, "stranger")
    assert value("handshake_seconds_bucket", outcome="ok", le="0.005") == 1
    assert value("handshake_seconds_bucket", outcome="failed", le="5.0") == 0
    assert value("handshake_seconds_bucket", outcome="failed", le="10.0") == 1
    assert value("dial_seconds_count", pool="p", outcome="reached") == 1
    assert value("dial_seconds_sum", pool="p", outcome="failed") == 5
    assert value("dial_seconds_count", pool="p", outcome="stranger") == 1


def test_draining_and_pending_connections_are_current(metrics, value):
    """A process whose gateway does not listen yet has no series for draining."""
    assert (value("draining"), value("pending_connections")) == (None, 0)
    metrics.set_draining(True)
    metrics.count_pending(+3)
    metrics.count_pending(-1)
    assert (value("draining"), value("pending_connections")) == (1, 2)
    metrics.set_draining(False)
    assert value("draining") == 0


async def test_an_open_connection_is_counted_with_its_bytes_handshake_and_dial(world):
    """With a real gateway. Afterwards nothing is counted as open."""
    streams = await world.connect(world.lease())
    await streams.echo(b"x" * 1000)
    assert world.metric("bytes_total", direction="up") == world.metric("bytes_total", direction="down") == 1000
    assert world.metric("open_connections", worker="p-worker-0") == world.metric("active_connections") == 1
    assert world.metric("dial_seconds_count", outcome="reached") == 1
    assert world.metrics.registry.get_sample_value("buildkit_gateway_handshake_seconds_count", {"outcome": "ok"}) == 1
    streams.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    assert world.metric("bytes_total", direction="up") == 1000
    assert _series(world.metrics, "open_connections") == {}
    assert _series(world.metrics, "pending_connections") == {(): 0}


async def test_a_failed_handshake_is_counted_and_leaves_no_pending_connection(world):
    """The handshake of a client without TLS."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    await reader.read()
    writer.close()
    count = world.metrics.registry.get_sample_value
    await world.wait_until(lambda: count("buildkit_gateway_handshake_seconds_count", {"outcome": "failed"}) == 1)
    await world.wait_until(lambda: count("buildkit_gateway_pending_connections") == 0)
    assert world.metrics.registry.get_sample_value(
        "buildkit_gateway_refusals_total", {"pool": "", "pool_namespace": "", "reason": "TlsFailed"}
    )


async def test_a_handshake_that_never_completes_counts_as_failed_and_a_probe_does_not_count(world):
    """Load balancers and kubelets open a connection and close it again as a probe."""
    _, probe = await asyncio.open_connection("127.0.0.1", world.port)
    _, silent = await asyncio.open_connection("127.0.0.1", world.port)
    count = world.metrics.registry.get_sample_value
    await world.wait_until(lambda: count("buildkit_gateway_pending_connections") == 2)
    probe.close()
    await world.wait_until(lambda: count("buildkit_gateway_pending_connections") == 1)
    assert _series(world.metrics, "handshake_seconds_count") == {}
    await world.advance(GatewayLimits().handshake_timeout)
    await world.wait_until(lambda: count("buildkit_gateway_pending_connections") == 0)
    silent.close()
    assert _series(world.metrics, "handshake_seconds_count") == {("failed",): 1}
