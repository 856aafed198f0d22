"""A gateway with several loops: which loop owns a lease, how a client gets there, and that all loops count together.

The other files test what one loop does for a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter

import pytest

from bkpool.core import tokens
from bkpool.core.errors import Gone, NoCapacity, Unavailable
from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.control.server import new_loop
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.limits import GatewayLimits
from support.loops import SkewedLoop
from support.peers import Peer

LOOPS = 2
P, Q = Key("default", "p"), Key("team", "q")


@pytest.fixture(params=[new_loop, pytest.param(SkewedLoop, marks=pytest.mark.slow)], ids=["uvloop", "asyncio"])
def new_gateway(request, new_world):
    """Makes a world whose gateway has several loops, of both kinds in turn."""

    async def make(threads=LOOPS, **limits):
        return await new_world(make_loop=request.param, threads=threads, **limits)

    return make


def threads_of(world):
    return world.gateway._threads


def owner_of(world, token):
    """Returns the number of the loop that owns a lease. Only the token's digest decides that."""
    return int(tokens.digest(token)[:8], 16) % len(threads_of(world))


def names_owned_by(world, owner, count=1):
    """Returns names of leases that this loop owns."""
    names = (f"lease-{number}" for number in range(1000))
    owned = (name for name in names if owner_of(world, world.token(name)) == owner)
    return [next(owned) for _ in range(count)]


def pending(world):
    return world.metrics.registry.get_sample_value("buildkit_gateway_pending_connections")


def taken_places(world):
    """Returns how many places are taken, in all and in each pool."""
    capacity = threads_of(world)[0].shard.leases._capacity
    return capacity._total, dict(capacity._by_pool)


async def wait_until_empty(world):
    """Waits until no connection is left and no place is taken."""
    await world.settle()  # a connection that moves between loops is not counted
    await world.wait_until(lambda: (pending(world), taken_places(world)) == (0, (0, {})))


def connections_by_loop(world):
    """Returns for each loop the leases of its connections."""
    return [
        Counter(connection._log_fields["allocation"] for connection in thread.shard._admitted)
        for thread in threads_of(world)
    ]


async def run_callbacks(loop):
    """Waits until this loop has handled all callbacks and events, and those that follow from them."""
    main = asyncio.get_running_loop()
    for _ in range(3):
        seen = asyncio.Event()
        loop.call_soon_threadsafe(main.call_soon_threadsafe, seen.set)
        await seen.wait()


@contextlib.asynccontextmanager
async def stopped_loop(world, number):
    """Blocks this loop meanwhile."""
    stopped, resume = asyncio.Event(), threading.Event()
    main = asyncio.get_running_loop()

    def block():
        main.call_soon_threadsafe(stopped.set)
        resume.wait(60)

    threads_of(world)[number].loop.call_soon_threadsafe(block)
    await stopped.wait()
    try:
        yield
    finally:
        resume.set()


async def wait_until_moving(world, accepted_by=0, handshakes=1):
    """Waits until the next connection has left the loop that accepted it."""
    async with asyncio.timeout(60):
        while handshakes_done(world) < handshakes:
            await run_callbacks(threads_of(world)[accepted_by].loop)
        await run_callbacks(threads_of(world)[accepted_by].loop)


def handshakes_done(world):
    labels = {"outcome": "ok"}
    return world.metrics.registry.get_sample_value("buildkit_gateway_handshake_seconds_count", labels) or 0


class RawClient:
    """A client that can send bytes together with the end of its handshake."""

    def __init__(self, world, token):
        context = world.ca.client_context(world.certificate(token))
        self._tls = TlsStream(context, server_side=False, server_hostname="localhost")
        self._sock = socket.create_connection(("127.0.0.1", world.port))
        self.peer = Peer(self._sock, self._tls)

    def handshake(self, data=b"", *, end=False):
        """Sends this data, and close_notify if wanted, together with the end of the handshake."""
        received = memoryview(b"")
        while not self._tls.handshake(received):
            self._sock.sendall(self._tls.take())
            received = memoryview(self._sock.recv(16384))
        self._tls.encrypt(memoryview(data))
        if end:
            self._tls.close_notify()
        self._sock.sendall(self._tls.take())


@contextlib.asynccontextmanager
async def raw_client(world, token):
    client = await asyncio.to_thread(RawClient, world, token)
    with contextlib.closing(client.peer):
        yield client


# --- owner loops ----------------------------------------------------------------------------------------------------


async def test_one_loop_owns_all_connections_of_a_lease(new_gateway):
    """So there is one registration and one count."""
    world = await new_gateway(threads=3)
    token = world.lease("a")
    for _ in range(6):  # each loop accepts two of them
        await (await world.connect(token)).echo(b"hello")
    expected = [Counter(), Counter(), Counter()]
    expected[owner_of(world, token)]["allocation-a"] = 6
    assert connections_by_loop(world) == expected
    assert world.registry.calls == [("register", "allocation-a")]
    assert world.registry.connections == [1]


async def test_leases_are_spread_over_all_loops(new_gateway):
    world = await new_gateway(threads=3)
    leases = {f"{number}": world.lease(f"{number}") for number in range(9)}
    for token in leases.values():
        await (await world.connect(token)).echo(b"hello")
    at = connections_by_loop(world)
    assert all(at[owner_of(world, token)][f"allocation-{name}"] == 1 for name, token in leases.items())
    assert sum(sum(each.values()) for each in at) == 9
    assert all(at), "a loop owns no lease"


async def test_accepted_clients_are_given_to_all_loops_in_turn(new_gateway):
    world = await new_gateway()
    with contextlib.ExitStack() as silent:
        for _ in range(2 * LOOPS):
            silent.enter_context(socket.create_connection(("127.0.0.1", world.port)))
        await world.wait_until(lambda: pending(world) == 2 * LOOPS)
        assert [len(thread.shard._pending) for thread in threads_of(world)] == [2] * LOOPS


async def test_the_owner_loop_finds_a_lease_that_is_newer_than_the_table(new_gateway):
    """The answer comes to that loop after the table with the lease."""
    world = await new_gateway()
    for owner in range(LOOPS):
        [name] = names_owned_by(world, owner)
        world.registry.on_find = lambda name=name: world.lease(name)
        await (await world.connect(world.token(name))).echo(b"hello")
        assert connections_by_loop(world)[owner] == {f"allocation-{name}": 1}


async def test_every_loop_refuses_clients_without_a_lease(new_gateway):
    world = await new_gateway()
    for _ in range(LOOPS):
        assert (await (await world.connect(world.token("unknown"))).call())[0] == 16
        assert (await (await world.connect()).call())[0] == 16
    await wait_until_empty(world)
    assert world.metrics.registry.get_sample_value(
        "buildkit_gateway_refusals_total", {"pool": "", "pool_namespace": "", "reason": "UnknownLease"}
    ) == float(LOOPS)


async def test_silent_clients_in_all_loops_do_not_keep_others_out(new_gateway, monkeypatch):
    world = await new_gateway(pending_connections=2 * LOOPS)
    token = world.lease("a")
    seen, count_pending = [], world.metrics.count_pending

    def counted(change):
        count_pending(change)
        seen.append(pending(world))

    monkeypatch.setattr(world.metrics, "count_pending", counted)
    with contextlib.ExitStack() as silent:
        for _ in range(8 * LOOPS):
            silent.enter_context(socket.create_connection(("127.0.0.1", world.port)))
        await (await world.connect(token)).echo(b"hello")
        assert 0 < pending(world) <= 2 * LOOPS
    await world.wait_until(lambda: pending(world) == 0)
    assert max(seen) <= 2 * LOOPS, "a place is never counted twice"


# --- moving from one loop to another --------------------------------------------------------------------------------


async def moving_lease(world, **changes):
    """Returns a lease whose next connection is accepted by the first loop and owned by the second."""
    [name] = names_owned_by(world, 1)
    return name, world.lease(name, **changes)


async def test_bytes_sent_before_during_and_after_the_move_reach_the_worker_in_order(new_gateway):
    """Both EOFs are passed on too: the client's, after which the worker still sends, and the worker's."""
    world = await new_gateway()
    _, token = await moving_lease(world)
    async with raw_client(world, token) as client:
        async with stopped_loop(world, 1):
            await asyncio.to_thread(client.handshake, b"with the handshake, ")
            await wait_until_moving(world)
            await asyncio.to_thread(client.peer.send, b"during the move, ")
        await asyncio.to_thread(client.peer.send, b"and after it")
        await asyncio.to_thread(client.peer.close_notify)
        received = await asyncio.to_thread(client.peer.receive)
        assert received == b"with the handshake, during the move, and after it"
        assert client.peer.close_notify_received
    await wait_until_empty(world)


@pytest.mark.parametrize("fin", [False, True], ids=["close_notify", "FIN too"])
async def test_a_client_that_sends_everything_with_the_handshake_gets_the_whole_answer(new_gateway, fin):
    world = await new_gateway()
    _, token = await moving_lease(world)
    async with raw_client(world, token) as client:
        await asyncio.to_thread(client.handshake, b"hello" * 1000, end=True)
        if fin:
            client.peer.fin()
        assert await asyncio.to_thread(client.peer.receive) == b"hello" * 1000
        assert client.peer.close_notify_received
    await wait_until_empty(world)


@pytest.mark.parametrize("owner", range(LOOPS))
async def test_a_client_that_sent_eof_with_the_handshake_is_not_held(new_gateway, owner):
    world = await new_gateway()
    [name] = names_owned_by(world, owner)
    token = world.lease(name, endpoint=None, wait_reason="it is being started")
    async with raw_client(world, token) as client:
        await asyncio.to_thread(client.handshake, b"hello", end=True)
        assert await asyncio.to_thread(client.peer.receive) == b""
    await wait_until_empty(world)
    assert world.metric("refusals_total", reason="Waited") == 0


@pytest.mark.parametrize("first", ["the end", "the connection"])
async def test_a_lease_that_ends_while_its_connection_moves_is_refused(new_gateway, first):
    """Whichever of the two reaches the owner loop first."""
    world = await new_gateway()
    name, token = await moving_lease(world)
    async with stopped_loop(world, 1):
        if first == "the end":
            world.lease(name, end_reason=EndReason.RELEASED)
        streams = await world.connect(token)
        await wait_until_moving(world)
        if first == "the connection":
            world.lease(name, end_reason=EndReason.RELEASED)
    code, sentence = await streams.call()
    assert (code, sentence) == (16, "the lease was released. Run `bkpool allocate` again.")
    assert world.worker_connections == 0
    await wait_until_empty(world)


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_client_that_leaves_during_the_move_leaves_nothing_behind(new_gateway, how):
    """The loop that it has left must get no event of it any more, because another thread owns it."""
    world = await new_gateway()
    _, token = await moving_lease(world, endpoint=None, wait_reason="it is being started")
    async with raw_client(world, token) as client:
        async with stopped_loop(world, 1):
            await asyncio.to_thread(client.handshake)
            await wait_until_moving(world)
            (client.peer.reset if how == "reset" else client.peer.fin)()
            await run_callbacks(threads_of(world)[0].loop)
            assert pending(world) == 0, "no loop counts it as pending"
        await wait_until_empty(world)
    await (await world.connect(world.lease("another"))).echo(b"hello")


async def test_a_connection_that_moves_to_a_draining_loop_is_closed_and_not_registered(new_gateway):
    """The loop may have reported already that it is empty. Then nothing would withdraw the registration."""
    world = await new_gateway()
    _, token = await moving_lease(world)
    await threads_of(world)[1].drain(600)
    assert await (await world.connect(token)).read_to_end() == b""
    await wait_until_empty(world)
    await world.gateway.close()
    assert world.registry.calls == []
    assert world.worker_connections == 0


async def test_a_connection_that_moves_when_the_gateway_closes_is_closed_too(new_gateway):
    world = await new_gateway()
    _, token = await moving_lease(world)
    async with stopped_loop(world, 1):
        streams = await world.connect(token)
        await wait_until_moving(world)
        closed = asyncio.create_task(world.gateway.close())
        await asyncio.sleep(0)
    assert await streams.read_to_end() == b""
    await closed
    assert pending(world) == 0
    assert world.worker_connections == 0


# --- limits ---------------------------------------------------------------------------------------------------------


async def test_the_connections_of_a_lease_are_limited_whichever_loop_accepts_them(new_gateway):
    world = await new_gateway(connections_per_lease=2)
    token = world.lease("a")
    pair = [await world.connect(token) for _ in range(2)]
    for streams in pair:
        await streams.echo(b"hello")
    for _ in range(LOOPS):
        code, sentence = await (await world.connect(token)).call()
        assert code == 8
        assert sentence.startswith("this lease already has 2 open connections")
    pair[0].writer.close()
    await world.wait_until(lambda: taken_places(world) == (1, {P: 1}))
    await (await world.connect(token)).echo(b"hello")


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"connections_per_pool": 2}, "pool default/p already has 2 open connections"),
        ({"connections": 3}, "the gateway already has 3 open connections"),
    ],
    ids=["of a pool", "in all"],
)
async def test_connections_are_limited_over_all_loops(new_gateway, limits, sentence):
    world = await new_gateway(**limits)
    clients = [await world.connect(world.lease(names_owned_by(world, owner)[0])) for owner in range(LOOPS)]
    clients.append(await world.connect(world.lease(names_owned_by(world, 0, 2)[1], pool=Q)))
    for streams in clients:
        await streams.echo(b"hello")
    assert taken_places(world) == (3, {P: 2, Q: 1})
    for owner in range(LOOPS):
        name = names_owned_by(world, owner, 3)[2]
        code, message = await (await world.connect(world.lease(name))).call()
        assert code == 8
        assert message == f"{sentence}. Try again when other builds have ended."
    clients[0].writer.close()
    await world.wait_until(lambda: taken_places(world) == (2, {P: 1, Q: 1}))
    await (await world.connect(world.lease(names_owned_by(world, 1, 4)[3]))).echo(b"hello")


async def leave(world, clients):
    for streams in clients:
        streams.writer.close()


async def reset(world, clients):
    for streams in clients:
        streams.writer.transport.abort()


async def lose_their_workers(world, clients):
    for worker in world.worker_writers:
        worker.transport.abort()


async def are_cut_because_another_lease_holds_the_worker(world, clients):
    def renew(leases):
        for lease in list(leases._leases.values()):
            lease.registration._request(leases.registry.renew)

    world.registry.error = Gone("another lease holds the worker", hint="")
    for thread in threads_of(world):
        thread.call(renew, thread.shard.leases)


async def are_refused(world, clients):
    for owner in range(LOOPS):
        for name in names_owned_by(world, owner, 2):
            world.lease(name, end_reason=EndReason.RELEASED)
    assert [(await streams.call())[0] for streams in clients] == [16] * len(clients)


async def are_closed_with_the_gateway(world, clients):
    await world.gateway.drain(0)


async def test_every_place_is_given_back_however_relayed_connections_end(new_gateway):
    world = await new_gateway()
    leases = [world.lease(name) for owner in range(LOOPS) for name in names_owned_by(world, owner, 2)]
    for end_them in (
        *(leave, reset, lose_their_workers, are_cut_because_another_lease_holds_the_worker),
        are_closed_with_the_gateway,
    ):
        world.registry.error = None
        clients = [await world.connect(token) for token in leases]
        for streams in clients:
            await streams.echo(b"hello")
        assert taken_places(world) == (len(clients), {P: len(clients)})
        await end_them(world, clients)
        await wait_until_empty(world)
        assert world.metric("active_connections") == 0


async def test_every_place_is_given_back_however_the_wait_for_a_worker_ends(new_gateway):
    world = await new_gateway()
    names = [name for owner in range(LOOPS) for name in names_owned_by(world, owner, 2)]
    for end_them in (leave, reset, are_refused, are_closed_with_the_gateway):
        leases = [world.lease(name, endpoint=None, wait_reason="soon", end_reason=None) for name in names]
        clients = [await world.connect(token) for token in leases]
        await world.wait_until(lambda: taken_places(world) == (4, {P: 4}))
        await end_them(world, clients)
        await wait_until_empty(world)
    assert world.worker_connections == 0


async def test_clients_that_vanish_during_the_handshake_take_no_place(new_gateway):
    world = await new_gateway()
    for end_them in (Peer.reset, Peer.fin):
        with contextlib.ExitStack() as stack:
            peers = [Peer(socket.create_connection(("127.0.0.1", world.port))) for _ in range(2 * LOOPS)]
            for peer in peers:
                stack.enter_context(contextlib.closing(peer))
                peer.send(b"\x16\x03\x01\x02\x00")
            await world.wait_until(lambda: pending(world) == 2 * LOOPS)
            assert taken_places(world) == (0, {})
            for peer in peers:
                end_them(peer)
            await wait_until_empty(world)


# --- all loops together ---------------------------------------------------------------------------------------------


async def test_closing_the_gateway_ends_the_connections_of_all_loops_and_the_threads(new_gateway):
    """The relayed, the held and the refused connections, and those in the handshake."""
    world = await new_gateway()
    loops = [thread.loop for thread in threads_of(world)]
    ends = []
    for owner in range(LOOPS):
        joined, waits = names_owned_by(world, owner, 2)
        ends.append(await world.connect(world.lease(joined)))
        await ends[-1].echo(b"hello")
        ends.append(await world.connect(world.lease(waits, endpoint=None, wait_reason="soon")))
        ends.append(await world.connect(world.token(f"unknown-{owner}")))
    await world.wait_until(lambda: world.registry.calls.count(("register", f"allocation-{waits}")) == 1)
    refused = "UnknownLease"
    await world.wait_until(lambda: world.metric("refusals_total", pool="", reason=refused) == LOOPS)
    with contextlib.ExitStack() as silent:
        for _ in range(LOOPS):
            silent.enter_context(socket.create_connection(("127.0.0.1", world.port)))
        await world.wait_until(lambda: pending(world) == 2 * LOOPS)
        await world.gateway.close()
    for streams in ends:
        await streams.read_to_end()
    assert pending(world) == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("gateway")]
    assert all(loop.is_closed() for loop in loops)
    entries = Counter(what for what, _ in world.registry.calls)
    assert entries["register"] == entries["withdraw"] == 2 * LOOPS


async def test_a_drain_waits_for_the_connections_of_every_loop(new_gateway):
    world = await new_gateway()
    clients = [await world.connect(world.lease(names_owned_by(world, owner)[0])) for owner in range(LOOPS)]
    for streams in clients:
        await streams.echo(b"hello")
    drained = asyncio.create_task(world.gateway.drain(600))
    for streams in clients:
        await world.settle()
        assert not drained.done()
        await streams.echo(b"still building")
        streams.writer.close()
    await drained


async def test_every_loop_uses_a_new_certificate_and_open_connections_stay(new_gateway):
    world = await new_gateway()
    leases = [world.lease(names_owned_by(world, owner)[0]) for owner in range(LOOPS)]
    old = [await world.connect(token) for token in leases]
    other = world.ca.server()
    world.gateway.set_server_certificate(other.cert, other.key, world.ca.pem)
    for answers in world.gateway.loops.values():
        await answers()  # uvloop may accept a connection before it runs what another thread asked for
    for token in leases * 2:
        new = await world.connect(token)
        assert new.writer.get_extra_info("ssl_object").getpeercert(binary_form=True) == other.der
        await new.echo(b"hello")
    for streams in old:
        await streams.echo(b"hello")


async def test_all_loops_count_into_the_same_metrics(new_gateway):
    world = await new_gateway()
    leases = [world.lease(names_owned_by(world, owner)[0]) for owner in range(LOOPS)]
    clients = [await world.connect(token) for token in leases * 2]
    for number, streams in enumerate(clients):
        await streams.echo(b"x" * 10**number)

    def sizes():
        return [world.metric("bytes_total", direction=direction) for direction in ("up", "down")]

    assert world.metric("active_connections") == 4
    assert [world.metric("open_connections", worker=f"p-worker-{number}") for number in range(LOOPS)] == [2, 2]
    assert sizes() == [1111, 1111]
    for streams in clients[:3]:
        streams.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 1)
    assert sizes() == [1111, 1111]
    assert world.metric("connections_total", status="success") == 4
    assert world.metric("dial_seconds_count", outcome="reached") == 4
    assert handshakes_done(world) == 4
    clients[3].writer.close()
    await wait_until_empty(world)
    assert world.metric("connection_duration_seconds_count") == 4


# --- Capacity -------------------------------------------------------------------------------------------------------


def test_a_pool_is_limited_and_takes_no_place_of_another_pool():
    capacity = Capacity(GatewayLimits(connections=3, connections_per_pool=2))
    capacity.take(P)
    capacity.take(P)
    with pytest.raises(NoCapacity, match=r"^pool default/p already has 2 open connections$"):
        capacity.take(P)
    capacity.take(Q)
    capacity.give_back(P)
    capacity.take(P)


def test_the_gateway_is_limited():
    capacity = Capacity(GatewayLimits(connections=3, connections_per_pool=2))
    for pool in (P, Q, Q):
        capacity.take(pool)
    with pytest.raises(NoCapacity, match=r"^the gateway already has 3 open connections$"):
        capacity.take(P)
    capacity.give_back(Q)
    capacity.take(P)


def test_a_refused_take_counts_nothing_and_an_empty_pool_is_forgotten():
    capacity = Capacity(GatewayLimits(connections=3, connections_per_pool=1))
    capacity.take(P)
    for _ in range(3):
        with pytest.raises(NoCapacity):
            capacity.take(P)
    capacity.take(Q)
    assert (capacity._total, dict(capacity._by_pool)) == (2, {P: 1, Q: 1})
    capacity.give_back(P)
    capacity.give_back(Q)
    assert (capacity._total, dict(capacity._by_pool)) == (0, {})


class SlowLimit(int):
    """A limit that lets other threads run between the comparison and what follows from it."""

    def __le__(self, other):
        reached = int(self) <= other
        time.sleep(1e-6)  # with 0 mostly no other thread runs
        return reached


def test_simultaneous_threads_take_no_more_places_than_exist():
    capacity = Capacity(GatewayLimits(connections=SlowLimit(3), connections_per_pool=SlowLimit(2)))
    barrier, clients = threading.Barrier(6), []

    def take_place(pool):
        barrier.wait()
        with contextlib.suppress(NoCapacity):
            capacity.take(pool)
            clients.append(pool)

    threads = [threading.Thread(target=take_place, args=(pool,)) for pool in (P, P, P, Q, Q, Q)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clients) == 3
    assert set(clients) == {P, Q}, "no pool has more than two"
    for pool in clients:
        capacity.give_back(pool)
    assert (capacity._total, dict(capacity._by_pool)) == (0, {})


async def test_each_loop_tells_whether_it_answers(new_gateway):
    world = await new_gateway()
    may_go_on = threading.Event()
    first, second = world.gateway.loops.values()
    async with asyncio.timeout(60):
        await first()
        await second()
        threads_of(world)[1].call(may_go_on.wait, 60)
        await first()
        hung = asyncio.create_task(second())
        await first()
        assert not hung.done()
        may_go_on.set()
        await hung
    await world.gateway.close()
    with pytest.raises(Unavailable, match="gateway-0, a loop of the gateway, has ended"):
        await first()
