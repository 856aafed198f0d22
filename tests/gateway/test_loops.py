"""A gateway with several loops: whose a lease is, how a client comes there, and that all of them together keep count.

That each does for a client what one loop does is shown by the other files, which have one.
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
from bkpool.core.errors import Gone, NoCapacity
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


@pytest.fixture(params=[new_loop, SkewedLoop], ids=["uvloop", "asyncio"])
def new_gateway(request, new_world):
    """Makes a world whose gateway has several loops, of either kind."""

    async def make(threads=LOOPS, **limits):
        return await new_world(make_loop=request.param, threads=threads, **limits)

    return make


def threads_of(world):
    return world.gateway._threads


def home_of(world, token):
    """The number of the loop that a lease lives in: so says its digest, and nothing else."""
    return int(tokens.digest(token)[:8], 16) % len(threads_of(world))


def names_at(world, home, count=1):
    """Names of leases that live in this loop."""
    names = (f"lease-{number}" for number in range(1000))
    at_home = (name for name in names if home_of(world, world.token(name)) == home)
    return [next(at_home) for _ in range(count)]


def guests(world):
    return world.metrics.registry.get_sample_value("buildkit_gateway_pending_connections")


def places(world):
    """How many are taken, in all and in each pool."""
    capacity = threads_of(world)[0].shard.leases._capacity
    return capacity._total, dict(capacity._by_pool)


async def empty(world):
    """Nobody is inside any more, and no place is taken."""
    await world.settle()  # somebody may be on the way, and in no count
    await world.wait_until(lambda: (guests(world), places(world)) == (0, (0, {})))


def tenants(world):
    """Whose connections each loop has."""
    return [
        Counter(connection._log_fields["allocation"] for connection in thread.shard._admitted)
        for thread in threads_of(world)
    ]


async def turned(loop):
    """What has been posted to this loop, and the events that it had, are done; and what follows from them."""
    main = asyncio.get_running_loop()
    for _ in range(3):
        seen = asyncio.Event()
        loop.call_soon_threadsafe(main.call_soon_threadsafe, seen.set)
        await seen.wait()


@contextlib.asynccontextmanager
async def standing_still(world, number):
    """This loop does nothing meanwhile."""
    stands, goes_on = asyncio.Event(), threading.Event()
    main = asyncio.get_running_loop()

    def stand():
        main.call_soon_threadsafe(stands.set)
        goes_on.wait(20)

    threads_of(world)[number].loop.call_soon_threadsafe(stand)
    await stands.wait()
    try:
        yield
    finally:
        goes_on.set()


async def on_its_way(world, accepted_by=0, handshakes=1):
    """The next connection has left the loop that has accepted it."""
    async with asyncio.timeout(10):
        while shaken(world) < handshakes:
            await turned(threads_of(world)[accepted_by].loop)
        await turned(threads_of(world)[accepted_by].loop)


def shaken(world):
    labels = {"outcome": "ok"}
    return world.metrics.registry.get_sample_value("buildkit_gateway_handshake_seconds_count", labels) or 0


class Raw:
    """A client that chooses what it says in one breath."""

    def __init__(self, world, token):
        context = world.ca.client_context(world.certificate(token))
        self._tls = TlsStream(context, server_side=False, server_hostname="localhost")
        self._sock = socket.create_connection(("127.0.0.1", world.port))
        self.peer = Peer(self._sock, self._tls)

    def handshake(self, data=b"", *, end=False):
        """With the last words of the handshake come these, and the end of all."""
        heard = memoryview(b"")
        while not self._tls.handshake(heard):
            self._sock.sendall(self._tls.take())
            heard = memoryview(self._sock.recv(16384))
        self._tls.encrypt(memoryview(data))
        if end:
            self._tls.close_notify()
        self._sock.sendall(self._tls.take())


@contextlib.asynccontextmanager
async def raw(world, token):
    client = await asyncio.to_thread(Raw, world, token)
    with contextlib.closing(client.peer):
        yield client


# --- homes ----------------------------------------------------------------------------------------------------------


async def test_the_connections_of_a_lease_have_one_home_whichever_loop_accepts_them(new_gateway):
    """And so one registration, and one count."""
    world = await new_gateway(threads=3)
    token = world.lease("a")
    for _ in range(6):  # dealt out in turn: two to each loop
        await (await world.connect(token)).echo(b"hello")
    expected = [Counter(), Counter(), Counter()]
    expected[home_of(world, token)]["allocation-a"] = 6
    assert tenants(world) == expected
    assert world.registry.calls == [("register", "allocation-a")]
    assert world.registry.connections == [1]


async def test_leases_are_spread_over_the_loops(new_gateway):
    world = await new_gateway(threads=3)
    leases = {f"{number}": world.lease(f"{number}") for number in range(9)}
    for token in leases.values():
        await (await world.connect(token)).echo(b"hello")
    at = tenants(world)
    assert all(at[home_of(world, token)][f"allocation-{name}"] == 1 for name, token in leases.items())
    assert sum(sum(each.values()) for each in at) == 9
    assert all(at), "a loop has none"


async def test_clients_are_dealt_out_to_all_loops_before_anyone_knows_whose_they_are(new_gateway):
    world = await new_gateway()
    with contextlib.ExitStack() as silent:
        for _ in range(2 * LOOPS):
            silent.enter_context(socket.create_connection(("127.0.0.1", world.port)))
        await world.wait_until(lambda: guests(world) == 2 * LOOPS)
        assert [len(thread.shard._pending) for thread in threads_of(world)] == [2] * LOOPS


async def test_a_lease_that_is_newer_than_the_table_is_looked_up_by_its_home(new_gateway):
    """The answer comes behind the table that has it, in that loop."""
    world = await new_gateway()
    for home in range(LOOPS):
        [name] = names_at(world, home)
        world.registry.on_find = lambda name=name: world.lease(name)
        await (await world.connect(world.token(name))).echo(b"hello")
        assert tenants(world)[home] == {f"allocation-{name}": 1}


async def test_who_has_no_lease_is_told_so_by_whichever_loop(new_gateway):
    world = await new_gateway()
    for _ in range(LOOPS):
        assert (await (await world.connect(world.token("nobody's"))).call())[0] == 16
        assert (await (await world.connect()).call())[0] == 16
    await empty(world)
    assert world.metrics.registry.get_sample_value(
        "buildkit_gateway_refusals_total", {"pool": "", "reason": "UnknownLease"}
    ) == float(LOOPS)


async def test_silent_clients_in_all_loops_keep_no_good_one_out(new_gateway):
    world = await new_gateway(pending_connections=2 * LOOPS)
    token = world.lease("a")
    with contextlib.ExitStack() as silent:
        for _ in range(8 * LOOPS):
            silent.enter_context(socket.create_connection(("127.0.0.1", world.port)))
        await (await world.connect(token)).echo(b"hello")
        assert 0 < guests(world) <= 2 * LOOPS
    await world.wait_until(lambda: guests(world) == 0)


# --- on the way from one loop to another ----------------------------------------------------------------------------


async def moving(world, **changes):
    """A lease whose next connection is accepted by the first loop and lives in the second."""
    [name] = names_at(world, 1)
    return name, world.lease(name, **changes)


async def test_what_a_client_says_before_at_and_after_its_move_reaches_the_worker_in_order(new_gateway):
    """And both ends are passed on: the client's, after which the worker still speaks, and the worker's."""
    world = await new_gateway()
    _, token = await moving(world)
    async with raw(world, token) as client:
        async with standing_still(world, 1):
            await asyncio.to_thread(client.handshake, b"with the handshake, ")
            await on_its_way(world)
            await asyncio.to_thread(client.peer.send, b"on the way, ")
        await asyncio.to_thread(client.peer.send, b"and at home")
        await asyncio.to_thread(client.peer.close_notify)
        heard = await asyncio.to_thread(client.peer.receive)
        assert heard == b"with the handshake, on the way, and at home"
        assert client.peer.close_notify_received
    await empty(world)


@pytest.mark.parametrize("fin", [False, True], ids=["close_notify", "FIN too"])
async def test_a_client_that_says_everything_in_one_breath_hears_the_whole_answer(new_gateway, fin):
    world = await new_gateway()
    _, token = await moving(world)
    async with raw(world, token) as client:
        await asyncio.to_thread(client.handshake, b"hello" * 1000, end=True)
        if fin:
            client.peer.fin()
        assert await asyncio.to_thread(client.peer.receive) == b"hello" * 1000
        assert client.peer.close_notify_received
    await empty(world)


@pytest.mark.parametrize("home", range(LOOPS))
async def test_a_client_that_has_said_its_end_with_the_handshake_is_not_held_for_a_worker_on_its_way(
    new_gateway, home
):
    world = await new_gateway()
    [name] = names_at(world, home)
    token = world.lease(name, endpoint=None, wait_reason="it is being started")
    async with raw(world, token) as client:
        await asyncio.to_thread(client.handshake, b"hello", end=True)
        assert await asyncio.to_thread(client.peer.receive) == b""
    await empty(world)
    assert world.metric("refusals_total", reason="Waited") == 0


@pytest.mark.parametrize("first", ["the end", "the connection"])
async def test_a_lease_that_ends_while_its_connection_is_on_the_way_is_over_for_it(new_gateway, first):
    """Whichever comes home first."""
    world = await new_gateway()
    name, token = await moving(world)
    async with standing_still(world, 1):
        if first == "the end":
            world.lease(name, end_reason=EndReason.RELEASED)
        streams = await world.connect(token)
        await on_its_way(world)
        if first == "the connection":
            world.lease(name, end_reason=EndReason.RELEASED)
    code, sentence = await streams.call()
    assert (code, sentence) == (16, "the lease was released. Run `bkpool allocate` again.")
    assert world.worker_connections == 0
    await empty(world)


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_client_that_leaves_on_the_way_leaves_nothing_behind(new_gateway, how):
    """The loop that it has left must not hear of it any more: it is another thread's."""
    world = await new_gateway()
    _, token = await moving(world, endpoint=None, wait_reason="it is being started")
    async with raw(world, token) as client:
        async with standing_still(world, 1):
            await asyncio.to_thread(client.handshake)
            await on_its_way(world)
            (client.peer.reset if how == "reset" else client.peer.fin)()
            await turned(threads_of(world)[0].loop)
            assert guests(world) == 0, "it is nobody's guest"
        await empty(world)
    await (await world.connect(world.lease("another"))).echo(b"hello")


async def test_who_comes_home_to_a_loop_that_drains_is_closed_and_not_registered(new_gateway):
    """The loop may have told already that it is empty, and nobody would take the registration out again."""
    world = await new_gateway()
    _, token = await moving(world)
    await threads_of(world)[1].drain(600)
    assert await (await world.connect(token)).read_to_end() == b""
    await empty(world)
    await world.gateway.close()
    assert world.registry.calls == []
    assert world.worker_connections == 0


async def test_who_is_on_the_way_when_the_gateway_closes_is_closed_too(new_gateway):
    world = await new_gateway()
    _, token = await moving(world)
    async with standing_still(world, 1):
        streams = await world.connect(token)
        await on_its_way(world)
        closed = asyncio.create_task(world.gateway.close())
        await asyncio.sleep(0)
    assert await streams.read_to_end() == b""
    await closed
    assert guests(world) == 0
    assert world.worker_connections == 0


# --- places ---------------------------------------------------------------------------------------------------------


async def test_the_places_of_a_lease_are_counted_whichever_loop_accepts(new_gateway):
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
    await world.wait_until(lambda: places(world) == (1, {P: 1}))
    await (await world.connect(token)).echo(b"hello")


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"connections_per_pool": 2}, "pool default/p already has 2 open connections"),
        ({"connections": 3}, "the gateway already has 3 open connections"),
    ],
    ids=["of a pool", "in all"],
)
async def test_places_are_counted_over_all_loops(new_gateway, limits, sentence):
    world = await new_gateway(**limits)
    inside = [await world.connect(world.lease(names_at(world, home)[0])) for home in range(LOOPS)]
    inside.append(await world.connect(world.lease(names_at(world, 0, 2)[1], pool=Q)))
    for streams in inside:
        await streams.echo(b"hello")
    assert places(world) == (3, {P: 2, Q: 1})
    for home in range(LOOPS):
        name = names_at(world, home, 3)[2]
        code, told = await (await world.connect(world.lease(name))).call()
        assert code == 8
        assert told == f"{sentence}. Try again when other builds have ended."
    inside[0].writer.close()
    await world.wait_until(lambda: places(world) == (2, {P: 1, Q: 1}))
    await (await world.connect(world.lease(names_at(world, 1, 4)[3]))).echo(b"hello")


async def leave(world, inside):
    for streams in inside:
        streams.writer.close()


async def reset(world, inside):
    for streams in inside:
        streams.writer.transport.abort()


async def lose_their_workers(world, inside):
    for worker in world.worker_writers:
        worker.transport.abort()


async def are_cut_because_the_worker_is_anothers(world, inside):
    def renew(leases):
        for lease in list(leases._leases.values()):
            lease.registration._request(leases.registry.renew)

    world.registry.error = Gone("the worker is another's", hint="")
    for thread in threads_of(world):
        thread.call(renew, thread.shard.leases)


async def are_refused(world, inside):
    for home in range(LOOPS):
        for name in names_at(world, home, 2):
            world.lease(name, end_reason=EndReason.RELEASED)
    assert [(await streams.call())[0] for streams in inside] == [16] * len(inside)


async def are_closed_with_the_gateway(world, inside):
    await world.gateway.drain(0)


async def test_every_place_comes_back_however_joined_connections_end(new_gateway):
    world = await new_gateway()
    leases = [world.lease(name) for home in range(LOOPS) for name in names_at(world, home, 2)]
    for they in (
        *(leave, reset, lose_their_workers, are_cut_because_the_worker_is_anothers),
        are_closed_with_the_gateway,
    ):
        world.registry.error = None
        inside = [await world.connect(token) for token in leases]
        for streams in inside:
            await streams.echo(b"hello")
        assert places(world) == (len(inside), {P: len(inside)})
        await they(world, inside)
        await empty(world)
        assert world.metric("active_connections") == 0


async def test_every_place_comes_back_however_the_wait_for_a_worker_ends(new_gateway):
    world = await new_gateway()
    names = [name for home in range(LOOPS) for name in names_at(world, home, 2)]
    for they in (leave, reset, are_refused, are_closed_with_the_gateway):
        leases = [world.lease(name, endpoint=None, wait_reason="soon", end_reason=None) for name in names]
        inside = [await world.connect(token) for token in leases]
        await world.wait_until(lambda: places(world) == (4, {P: 4}))
        await they(world, inside)
        await empty(world)
    assert world.worker_connections == 0


async def test_no_place_is_taken_by_those_that_vanish_in_their_handshake(new_gateway):
    world = await new_gateway()
    for they in (Peer.reset, Peer.fin):
        with contextlib.ExitStack() as stack:
            peers = [Peer(socket.create_connection(("127.0.0.1", world.port))) for _ in range(2 * LOOPS)]
            for peer in peers:
                stack.enter_context(contextlib.closing(peer))
                peer.send(b"\x16\x03\x01\x02\x00")
            await world.wait_until(lambda: guests(world) == 2 * LOOPS)
            assert places(world) == (0, {})
            for peer in peers:
                they(peer)
            await empty(world)


# --- the gateway as one ---------------------------------------------------------------------------------------------


async def test_the_end_of_the_gateway_ends_connections_in_all_loops_and_the_threads(new_gateway):
    """The joined, the waiting, the refused and those in their handshake."""
    world = await new_gateway()
    loops = [thread.loop for thread in threads_of(world)]
    ends = []
    for home in range(LOOPS):
        joined, waits = names_at(world, home, 2)
        ends.append(await world.connect(world.lease(joined)))
        await ends[-1].echo(b"hello")
        ends.append(await world.connect(world.lease(waits, endpoint=None, wait_reason="soon")))
        ends.append(await world.connect(world.token(f"nobody's-{home}")))
    await world.wait_until(lambda: world.registry.calls.count(("register", f"allocation-{waits}")) == 1)
    refused = "UnknownLease"
    await world.wait_until(lambda: world.metric("refusals_total", pool="", reason=refused) == LOOPS)
    with contextlib.ExitStack() as silent:
        for _ in range(LOOPS):
            silent.enter_context(socket.create_connection(("127.0.0.1", world.port)))
        await world.wait_until(lambda: guests(world) == 2 * LOOPS)
        await world.gateway.close()
    for streams in ends:
        await streams.read_to_end()
    assert guests(world) == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("gateway")]
    assert all(loop.is_closed() for loop in loops)
    entries = Counter(what for what, _ in world.registry.calls)
    assert entries["register"] == entries["withdraw"] == 2 * LOOPS


async def test_a_drain_waits_for_the_connections_of_every_loop(new_gateway):
    world = await new_gateway()
    inside = [await world.connect(world.lease(names_at(world, home)[0])) for home in range(LOOPS)]
    for streams in inside:
        await streams.echo(b"hello")
    drained = asyncio.create_task(world.gateway.drain(600))
    for streams in inside:
        await world.settle()
        assert not drained.done()
        await streams.echo(b"still building")
        streams.writer.close()
    await drained


async def test_a_new_certificate_is_seen_in_every_loop_and_open_connections_go_on(new_gateway):
    world = await new_gateway()
    leases = [world.lease(names_at(world, home)[0]) for home in range(LOOPS)]
    old = [await world.connect(token) for token in leases]
    other = world.ca.server()
    world.gateway.set_server_certificate(other.cert, other.key, world.ca.pem)
    for token in leases * 2:
        new = await world.connect(token)
        assert new.writer.get_extra_info("ssl_object").getpeercert(binary_form=True) == other.der
        await new.echo(b"hello")
    for streams in old:
        await streams.echo(b"hello")


async def test_the_loops_count_into_one_set_of_metrics(new_gateway):
    world = await new_gateway()
    leases = [world.lease(names_at(world, home)[0]) for home in range(LOOPS)]
    inside = [await world.connect(token) for token in leases * 2]
    for number, streams in enumerate(inside):
        await streams.echo(b"x" * 10**number)

    def sizes():
        return [world.metric("bytes_total", direction=direction) for direction in ("up", "down")]

    assert world.metric("active_connections") == 4
    assert world.metric("open_connections", worker="p-worker-0") == 4
    assert sizes() == [1111, 1111]
    for streams in inside[:3]:
        streams.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 1)
    assert sizes() == [1111, 1111]
    assert world.metric("connections_total", status="success") == 4
    assert world.metric("dial_seconds_count", outcome="reached") == 4
    assert shaken(world) == 4
    inside[3].writer.close()
    await empty(world)
    assert world.metric("connection_duration_seconds_count") == 4


# --- Capacity -------------------------------------------------------------------------------------------------------


def test_a_pool_has_so_many_places_and_no_pool_takes_those_of_another():
    capacity = Capacity(GatewayLimits(connections=3, connections_per_pool=2))
    capacity.take(P)
    capacity.take(P)
    with pytest.raises(NoCapacity, match=r"^pool default/p already has 2 open connections$"):
        capacity.take(P)
    capacity.take(Q)
    capacity.give_back(P)
    capacity.take(P)


def test_the_gateway_has_so_many_places():
    capacity = Capacity(GatewayLimits(connections=3, connections_per_pool=2))
    for pool in (P, Q, Q):
        capacity.take(pool)
    with pytest.raises(NoCapacity, match=r"^the gateway already has 3 open connections$"):
        capacity.take(P)
    capacity.give_back(Q)
    capacity.take(P)


def test_who_is_refused_has_taken_nothing_and_a_pool_that_is_left_is_forgotten():
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


class Bound(int):
    """Lets the other threads go on between a comparison and what follows from it."""

    def __le__(self, other):
        reached = int(self) <= other
        time.sleep(1e-6)  # 0 would most often have no other thread run
        return reached


def test_threads_at_once_take_no_more_places_than_there_are():
    capacity = Capacity(GatewayLimits(connections=Bound(3), connections_per_pool=Bound(2)))
    begin, inside = threading.Barrier(6), []

    def come(pool):
        begin.wait()
        with contextlib.suppress(NoCapacity):
            capacity.take(pool)
            inside.append(pool)

    threads = [threading.Thread(target=come, args=(pool,)) for pool in (P, P, P, Q, Q, Q)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 3
    assert set(inside) == {P, Q}, "nobody has more than two"
    for pool in inside:
        capacity.give_back(pool)
    assert (capacity._total, dict(capacity._by_pool)) == (0, {})
