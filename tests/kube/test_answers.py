"""Watches, lists and requests against a scripted API server.

The tests with a real API server, directly and behind a proxy, are in e2e/kind.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bkpool.core.errors import (
    Conflict,
    Forbidden,
    Gone,
    HostFault,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.worker import Worker, new_worker
from bkpool.kube import ClusterAccess, KubeApi, KubeLimits, client
from bkpool.kube.errors import error_of
from bkpool.store.kubernetes import KubernetesStore
from support.world import WAIT, skip_real_time

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: x
contexts: [{{name: x, context: {{cluster: x, user: x}}}}]
clusters: [{{name: x, cluster: {{server: "{url}"}}}}]
users: [{{name: x, user: {{}}}}]
"""
Play = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers each request with the next handler in `plays`; the last one answers all further requests."""

    def __init__(self) -> None:
        self.plays: list[Play] = []
        self.asked: list[web.Request] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        return await (self.plays.pop(0) if len(self.plays) > 1 else self.plays[0])(request)


class NoToken:
    """The part of the configuration that a request needs."""

    host = "http://server"

    async def auth_settings(self) -> dict:
        return {}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def api(server: Server) -> AsyncIterator[KubeApi]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    async with TestServer(app, handler_cancellation=True) as running:
        timeout = aiohttp.ClientTimeout(total=WAIT)
        session = aiohttp.ClientSession(base_url=running.make_url("/"), timeout=timeout)
        api = KubeApi(session, NoToken(), "default")
        yield api
        await api.close()


@pytest.fixture
def store(api: KubeApi) -> KubernetesStore:
    return KubernetesStore(api, jitter=lambda: 0.5)


def a_pool(version: int, name: str = "p", **spec) -> dict:
    metadata = {
        "name": name,
        "namespace": "default",
        "uid": name,
        "resourceVersion": str(version),
        "managedFields": [1],
    }
    return {
        "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
        "kind": "BuildKitPool",
        "metadata": metadata,
        "spec": spec,
    }


def event(type_: str, doc: dict) -> bytes:
    return json.dumps({"type": type_, "object": doc}).encode() + b"\n"


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"kind": "BuildKitPool", "metadata": {"resourceVersion": str(version)}})


def status(code: int, **more) -> dict:
    return {"kind": "Status", "code": code, "message": f"the server says {code}", **more}


def streams(*chunks: bytes, then: str = "") -> Play:
    """A watch that sends these bytes. Then the server ends it, stays silent, or cuts the connection."""

    async def play(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for chunk in chunks:
            await answer.write(chunk)
        if then == "silence":
            await asyncio.Event().wait()
        if then == "torn":
            request.transport.abort()
        return answer

    return play


def answers(code: int, body: object, **headers: str) -> Play:
    async def play(_request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=code, headers=headers)

    return play


async def never(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def too_late(request: web.Request) -> web.StreamResponse:
    """The limit of the request passes while the server has it."""
    skip_real_time()
    return await never(request)


async def taken(store: KubernetesStore, count: int, since: str = "5") -> list[str]:
    """The versions of that many events."""
    async with asyncio.timeout(60), aclosing(store.watch(Pool, since)) as events:
        return [(await anext(events)).object.metadata.resource_version for _ in range(count)]


# --- watch ----------------------------------------------------------------------------------------------------------


async def test_a_watch_continues_from_the_last_version_bookmarks_included(server, store):
    server.plays = [
        streams(event("ADDED", a_pool(6)), bookmark(40)),
        streams(event("MODIFIED", a_pool(41)), then="silence"),
    ]
    assert await taken(store, 2) == ["6", "41"]
    asked = [dict(request.query) for request in server.asked]
    assert [query["resourceVersion"] for query in asked] == ["5", "40"]
    assert {query["allowWatchBookmarks"] for query in asked} == {"true"}
    assert {query["timeoutSeconds"] for query in asked} == {"270"}


async def test_an_unreadable_object_is_told_apart_and_not_requested_again(server, store):
    odd = a_pool(7, "odd", scaling={"max": -1})
    server.plays = [streams(event("ADDED", odd)), streams(event("ADDED", a_pool(8)), then="silence")]
    async with aclosing(store.watch(Pool, "5")) as watch:
        found, good = (await anext(watch)).object, (await anext(watch)).object
    assert isinstance(found, Unreadable)
    assert (found.key, found.version, good.metadata.resource_version) == (Key("default", "odd"), "7", "8")
    assert "spec.scaling.max" in found.reason
    assert [request.query["resourceVersion"] for request in server.asked] == ["5", "7"]


@pytest.mark.parametrize(
    "play",
    [
        streams(event("ADDED", a_pool(6))[:40]),
        streams(event("ADDED", a_pool(6))[:40], then="torn"),
        streams(b"<html>a balancer's apology</html>\n"),
        streams(event("ERROR", status(500))),
        streams(),
        answers(429, status(429), **{"Retry-After": "7"}),
        answers(503, status(503)),
    ],
    ids=["half an event", "torn", "no JSON", "ERROR 500", "ended at once", "429", "503"],
)
async def test_a_broken_watch_raises_unavailable(server, store, play):
    server.plays = [play]
    with pytest.raises(Unavailable):
        await taken(store, 1)


@pytest.mark.parametrize("play", [streams(event("ERROR", status(410))), answers(410, status(410))])
async def test_an_expired_version_raises_gone_by_status_or_by_event(server, store, play):
    server.plays = [play]
    with pytest.raises(Gone):
        await taken(store, 1)


async def test_the_deletion_of_an_unreadable_object_is_an_event_as_any_other(server, store):
    server.plays = [streams(event("DELETED", a_pool(6, scaling={"max": -1})), then="silence")]
    async with aclosing(store.watch(Pool, "5")) as watch:
        deleted = await anext(watch)
    assert (deleted.type, deleted.object.key.name) == ("DELETED", "p")


async def test_only_the_status_of_an_unreadable_object_is_written(server, store):
    odd = a_pool(7, "odd", scaling={"max": -1})
    server.plays = [answers(200, odd)]
    with pytest.raises(UnreadableObject) as raised:
        await store.get(Pool, "default", "odd")
    await store.patch_status(raised.value.found, {"phase": "Degraded"})
    asked = server.asked[-1]
    assert (asked.method, asked.path.rpartition("/")[2]) == ("PUT", "status")


async def test_a_silent_watch_counts_as_frozen(server, store, api):
    api.limits = replace(api.limits, watch_silence=0.05)
    server.plays = [streams(event("ADDED", a_pool(6)), then="silence")]
    with pytest.raises(Unavailable, match="does not answer"):
        await taken(store, 2)


async def test_a_watch_is_asked_to_last_as_long_as_its_limit_says(server, store, api):
    api.limits = replace(api.limits, watch_duration=60.0)
    server.plays = [streams(event("ADDED", a_pool(6)))]
    await taken(store, 1)
    assert server.asked[0].query["timeoutSeconds"] == "68", "and up to a quarter more"


# --- list -----------------------------------------------------------------------------------------------------------


async def test_a_long_list_is_read_in_pages_of_one_version(server, store):
    def page(*docs: dict, **metadata: str) -> Play:
        head = {"apiVersion": "buildkit.smrt-devops.net/v1alpha1", "kind": "BuildKitPoolList"}
        items = [{key: value for key, value in doc.items() if key not in head} for doc in docs]
        return answers(200, {**head, "metadata": {"resourceVersion": "9", **metadata}, "items": items})

    server.plays = [page(a_pool(1, "a"), **{"continue": "more"}), page(a_pool(2, "b"), a_pool(3, "c"))]
    listing = await store.list(Pool, labels={"team": "a", "tier": "x"})

    assert [pool.key.name for pool in listing.items] == ["a", "b", "c"]
    assert listing.resource_version == "9"
    assert server.asked[0].query["labelSelector"] == "team=a,tier=x"
    assert server.asked[1].query["continue"] == "more"

    server.plays = [page(a_pool(1, "a"), **{"continue": "more"}), answers(410, status(410))]
    with pytest.raises(Gone):
        await store.list(Pool)


# --- requests -------------------------------------------------------------------------------------------------------


async def test_only_429_is_retried_and_only_a_few_times(server, store, monkeypatch):
    monkeypatch.setattr(client, "_LONGEST_PAUSE", 0.0)
    refused = answers(429, status(429))
    server.plays = [refused, refused, answers(200, a_pool(6))]
    assert (await store.get(Pool, "default", "p")).metadata.resource_version == "6"

    server.plays, server.asked = [refused], []
    with pytest.raises(Unavailable, match="the server says 429"):
        await store.get(Pool, "default", "p")
    assert len(server.asked) == 4

    server.plays, server.asked = [answers(503, status(503))], []
    with pytest.raises(Unavailable, match="the server says 503"):
        await store.get(Pool, "default", "p")
    assert len(server.asked) == 1


@pytest.fixture
async def connected(server: Server, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[KubeApi]]]:
    """Connects as an appliance does, with limits, to the server or to another address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    opened: list[KubeApi] = []

    async def connect(url: str = "", **limits: float) -> KubeApi:
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(KUBECONFIG.format(url=url or running.make_url("/")))
        opened.append(await KubeApi.connect(ClusterAccess(kubeconfig), KubeLimits(**limits)))
        return opened[-1]

    async with TestServer(app, handler_cancellation=True) as running:
        yield connect
        for one in opened:
            await one.close()


async def test_a_request_ends_after_its_limit(server, connected):
    server.plays = [never]
    api = await connected(request_timeout=0.05)
    async with asyncio.timeout(60):
        with pytest.raises(Unavailable, match="does not answer"):
            await api.get("/api/v1/x")


async def test_an_address_that_accepts_no_connection_is_given_up_after_its_limit(connected):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        api = await connected(f"http://127.0.0.1:{port}", connect_timeout=0.1)
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable, match="does not answer"):
                await api.get("/api/v1/x")
            with pytest.raises(Unavailable, match="does not answer"):
                await anext(api.watch("/api/v1/x", "5"))
        for sock in waiting:
            sock.close()


async def test_an_idle_connection_is_closed_after_its_limit(connected):
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        assert await reader.read() == b""
        writer.close()
        closed.set()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening, asyncio.timeout(12):
        api = await connected(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", idle_timeout=0.05)
        await api.get("/api/v1/x")
        await closed.wait()


async def test_a_server_that_does_not_respond_in_time_is_unavailable(server, store):
    server.plays = [too_late]
    with pytest.raises(Unavailable, match="does not answer"):
        await store.get(Pool, "default", "p")


async def test_a_write_that_timed_out_but_was_stored_succeeds(server, store):
    pool = Pool.model_validate(a_pool(6, scaling={"max": 3}))
    server.plays = [too_late, answers(200, a_pool(7, scaling={"max": 3}))]
    assert (await store.replace(pool)).metadata.resource_version == "7"


@pytest.mark.parametrize(
    "stored", [answers(200, a_pool(7, scaling={"max": 4})), answers(404, status(404)), answers(503, status(503))]
)
@pytest.mark.parametrize(("lost", "error"), [(too_late, Unavailable), (answers(409, status(409)), Conflict)])
async def test_a_write_that_was_not_stored_raises_its_error(server, store, lost, error, stored):
    server.plays = [lost, stored]
    with pytest.raises(error):
        await store.replace(Pool.model_validate(a_pool(6, scaling={"max": 3})))


async def test_another_object_of_that_name_does_not_count_as_the_written_one(server, store):
    again = a_pool(7, scaling={"max": 3})
    again["metadata"]["uid"] = "another"
    server.plays = [answers(409, status(409)), answers(200, again)]
    with pytest.raises(Conflict):
        await store.replace(Pool.model_validate(a_pool(6, scaling={"max": 3})))


async def test_only_fields_of_bkpool_are_sent(server, store):
    bodies: list[dict] = []

    async def play(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return web.json_response(a_pool(7))

    server.plays = [play]
    pool = Pool.model_validate(a_pool(6) | {"status": {"phase": "Ready"}})
    await store.replace(pool)
    await store.replace_status(pool)

    assert [set(body) for body in bodies] == [
        {"apiVersion", "kind", "metadata", "spec"},
        {"apiVersion", "kind", "metadata", "status"},
    ]
    given = {"name", "namespace", "labels", "annotations", "finalizers", "ownerReferences", "resourceVersion"}
    assert all(set(body["metadata"]) == given for body in bodies)


async def test_an_unreadable_object_is_an_error_that_names_the_field(server, store):
    server.plays = [answers(200, a_pool(6, scaling={"max": -1}))]
    with pytest.raises(HostFault, match=r"default/p cannot be read: spec\.scaling\.max"):
        await store.get(Pool, "default", "p")


# --- deep objects and answers of others -----------------------------------------------------------------------------


def deep(levels: int, *, of: str = "x") -> str:
    """A pool in which the field has so many levels. json.dumps cannot write them."""
    doc = json.dumps(a_pool(6, "deep", resources={"buildkit": {of: "HERE"}}))
    return doc.replace('"HERE"', '{"a":[' * (levels // 2) + '"}{"' + "]}" * (levels // 2))


def sends(body: str) -> Play:
    async def play(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=body, content_type="application/json")

    return play


@pytest.mark.parametrize("levels", [200, 400, 9000])
async def test_an_object_that_is_too_deep_is_unreadable_and_hides_no_other(server, store, levels):
    one, good = deep(levels), json.dumps(a_pool(7, "good"))
    server.plays = [sends(f'{{"metadata":{{"resourceVersion":"9"}},"items":[{one},{good}]}}'), sends(one)]
    listing = await store.list(Pool)
    assert [pool.key.name for pool in listing.items] == ["good"]
    assert [(found.key.name, found.version) for found in listing.unreadable] == [("deep", "6")]
    assert "nested in more than" in listing.unreadable[0].reason

    with pytest.raises(UnreadableObject, match="nested in more than"):
        await store.get(Pool, "default", "deep")
    with pytest.raises(UnreadableObject):
        await store.replace(Pool.model_validate(a_pool(5, "deep")))

    lines = [f'{{"type":"ADDED","object":{doc}}}\n'.encode() for doc in (one, good)]
    server.plays = [streams(*lines, then="silence")]
    async with asyncio.timeout(60), aclosing(store.watch(Pool, "5")) as watch:
        seen = [(await anext(watch)).object for _ in range(2)]
    assert [isinstance(found, Unreadable) for found in seen] == [True, False]


async def test_an_object_that_the_parser_takes_can_be_written(server, store):
    server.plays = [sends(deep(180))]
    pool = await store.get(Pool, "default", "deep")
    await store.replace(pool)


async def test_a_worker_whose_status_is_too_deep_is_unreadable(server, store):
    made = new_worker(Slot("default", "p", 0), Pool.model_validate(a_pool(6)), None, {}).to_json()
    worker = json.dumps({**made, "status": None}).removesuffix("null}")
    server.plays = [sends(worker + '{"a":' * 300 + "1" + "}" * 301)]
    with pytest.raises(UnreadableObject, match="cannot be read: status"):
        await store.get(Worker, "default", "p-worker-0")


@pytest.mark.parametrize("body", ["<html>a balancer's apology</html>", '"ok"', "[1]", "{", "", "[" * 500])
async def test_what_is_no_answer_of_an_api_server_is_unavailable(server, store, body):
    server.plays = [sends(body)]
    with pytest.raises(Unavailable, match="no answer of an API server"):
        await store.list(Pool)
    with pytest.raises(Unavailable, match="no answer of an API server"):
        await store.get(Pool, "default", "p")


async def test_json_that_is_no_list_or_no_event_is_unavailable_too(server, store):
    server.plays = [answers(200, {"status": "ok"})]
    with pytest.raises(Unavailable, match="no list"):
        await store.list(Pool)
    server.plays = [streams(b'{"status":"ok"}\n')]
    with pytest.raises(Unavailable, match="no event"):
        await taken(store, 1)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, InvalidInput),
        (401, Unauthenticated),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (410, Gone),
        (413, InvalidInput),
        (422, InvalidInput),
        (429, Unavailable),
        (500, Unavailable),
        (504, Unavailable),
    ],
)
def test_each_status_has_its_error(code, kind):
    error = error_of(code, json.dumps(status(code)).encode(), what="GET /x")
    assert type(error) is kind
    assert error.message == f"Kubernetes: GET /x: the server says {code}"


def test_the_error_names_the_field_that_the_server_rejects():
    document = status(422, details={"causes": [{"field": "spec.max", "message": "no"}]})
    assert error_of(422, json.dumps(document).encode(), what="x").field == "spec.max"
    assert error_of(422, b"nonsense", what="x").field is None
    assert error_of(429, b"", what="x", retry_after="7").retry_after == 7
