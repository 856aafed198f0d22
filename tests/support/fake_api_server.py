"""A Kubernetes API server for tests and benchmarks: HTTP on the loopback interface over the objects in memory.

It counts what it is asked, by whom and of what. Tests can delay, break and expire its watches. It checks no schema
and no rights, runs no controller but the garbage collector, and keeps nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from support.fake_kinds import Doc, Matches, Refused, Where, bad_request, both, field_selector, label_selector, where
from support.fake_objects import FakeObjects, HistoryEntry, Stored

_PARAMS = {
    "allowWatchBookmarks",
    "continue",
    "dryRun",
    "fieldManager",
    "fieldSelector",
    "force",
    "labelSelector",
    "limit",
    "pretty",
    "propagationPolicy",
    "resourceVersion",
    "resourceVersionMatch",
    "tailLines",
    "limitBytes",
    "timeoutSeconds",
    "watch",
}
_REVIEWS = {"tokenreviews", "subjectaccessreviews", "selfsubjectaccessreviews", "selfsubjectrulesreviews"}
_ASKED_REMEMBERED = 20_000
_PAGES_REMEMBERED = 100
_WATCH_DURATION = 1800.0
_KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: fake
contexts: [{{name: fake, context: {{cluster: fake, user: "{user}", namespace: "{namespace}"}}}}]
clusters: [{{name: fake, cluster: {{server: "{url}"}}}}]
users: [{{name: "{user}", user: {{token: "{user}"}}}}]
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    user: str
    """The client's bearer token."""
    verb: str
    """As rights name it: get, list, watch, create, update, patch, delete."""
    where: Where
    params: dict[str, str]

    @property
    def resource(self) -> str:
        return self.where.resource


@dataclass(eq=False)
class OpenWatch:
    """A watch that a client has open."""

    asked: Asked
    matches: Matches | None
    position: int
    """The version up to which it has been sent everything."""
    pending: deque[HistoryEntry] = field(default_factory=deque)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def listen(self, entry: HistoryEntry) -> None:
        self.pending.append(entry)
        self.woken.set()

    def end(self) -> None:
        self.ended = True
        self.woken.set()


async def _pass(_: Asked) -> None:
    pass


class FakeApiServer:
    """The server. See `fake_api_server` for how to run one.

    Args:
        objects: The content.
        bookmark_interval: Seconds between two bookmarks of a watch. A real server sends one about every minute.
    """

    def __init__(self, objects: FakeObjects, *, bookmark_interval: float = 30.0) -> None:
        self.objects = objects
        self.url = ""
        self.watches: set[OpenWatch] = set()
        self.asked: deque[Asked] = deque(maxlen=_ASKED_REMEMBERED)
        """The last requests."""
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """Requests by user, verb and resource."""
        self.watch_bytes: Counter[tuple[str, str]] = Counter()
        """Bytes that were sent to watches, by user and resource."""
        self.watch_events: Counter[tuple[str, str]] = Counter()
        """Objects that were sent to watches, without bookmarks."""
        self.before: Callable[[Asked], Awaitable[None]] = _pass
        """Called before a request is carried out. It may wait, or raise Refused: then nothing is done."""
        self.after: Callable[[Asked], Awaitable[None]] = _pass
        """Called after a request was carried out and before it is answered. It may wait, or raise Refused instead."""
        self.before_events: Callable[[Asked], Awaitable[None]] = _pass
        """Called with the watch's request before events are sent to it: a late watch."""
        self._bookmark_interval = bookmark_interval
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._pages: dict[str, tuple[list[Stored], int]] = {}
        self._moved = asyncio.Event()

    # --- what a test does -------------------------------------------------------------------------------------------

    def write_kubeconfig(self, path: Path, user: str = "bkpool", namespace: str = "default") -> Path:
        """A kubeconfig for a client. The user's name is also their token."""
        path.write_text(_KUBECONFIG.format(url=self.url, user=user, namespace=namespace))
        return path

    def total(self, verb: str, resource: str = "", user: str = "") -> int:
        """How many such requests there were; an empty argument means any."""
        return sum(
            count
            for (by, what, of), count in self.counts.items()
            if what == verb and (not resource or of == resource) and (not user or by == user)
        )

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds, of the server or of a client in this loop."""
        async with asyncio.timeout(60):
            while not condition():
                self._moved.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await self._moved.wait()

    def reset_counts(self) -> None:
        for counter in (self.counts, self.watch_bytes, self.watch_events):
            counter.clear()
        self.asked.clear()

    def freeze_watches(self) -> None:
        """Watches stay open and are sent nothing, not even a bookmark."""
        self._flowing.clear()

    def go_on(self) -> None:
        """Watches are sent what they have missed."""
        self._flowing.set()

    def break_watches(self, user: str = "", resource: str = "") -> None:
        """Ends these watches. Their clients begin new ones where the old ones were."""
        for watch in self.watches:
            if (not user or watch.asked.user == user) and (not resource or watch.asked.resource == resource):
                watch.end()

    def expire_watches(self) -> None:
        """Ends every watch and forgets all history, so that clients must list again."""
        self.objects.version += 1
        for collection in self.objects.collections.values():
            collection.forget()
            collection.forgotten = self.objects.version
        self.break_watches()

    # --- requests ---------------------------------------------------------------------------------------------------

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request."""
        self._moved.set()
        try:
            asked = _asked(request)
            self.asked.append(asked)
            self.counts[asked.user, asked.verb, asked.resource] += 1
            await self.before(asked)
            if asked.verb == "watch":
                return await self._watch(request, asked)
            raw = self._done(asked, request, await request.read())
            await self.after(asked)
        except Refused as refused:
            return web.json_response(refused.status, status=refused.code)
        return web.Response(body=raw, content_type="application/json")

    def _done(self, asked: Asked, request: web.BaseRequest, raw: bytes) -> bytes:
        at = asked.where
        if asked.verb == "list":
            return self._listed(asked)
        if asked.verb == "get":
            return b"" if at.sub == "log" else self.objects.get(at).raw
        try:
            body = json.loads(raw) if raw else {}
        except ValueError as error:
            raise bad_request(f"the body is not JSON: {error}") from None
        if at.plural in _REVIEWS:
            return json.dumps(_reviewed(at, body)).encode()
        return self._written(asked, body, request.content_type).raw

    def _written(self, asked: Asked, body: Any, content_type: str) -> Stored:
        at, manager, objects = asked.where, asked.params.get("fieldManager", "unknown"), self.objects
        match asked.verb:
            case "create":
                return objects.create(at, body, manager, dry_run="dryRun" in asked.params)
            case "update":
                return objects.replace(at, body, manager)
            case "patch":
                return objects.patch(at, body, content_type, manager)
            case _:
                return objects.delete(at, body)

    def _listed(self, asked: Asked) -> bytes:
        collection = self.objects.collection(asked.where)
        if token := asked.params.get("continue"):
            if token not in self._pages:
                raise Refused(410, "Expired", "the continue token is too old")
            found, version = self._pages.pop(token)
        else:
            matches = self._selector(asked)
            found, version = list(collection.selected(asked.where.namespace, matches)), self.objects.version
        limit = int(asked.params.get("limit", "0")) or len(found)
        metadata: Doc = {"resourceVersion": str(version)}
        if rest := found[limit:]:
            metadata |= {"continue": f"{version}.{len(rest)}.{len(self.asked)}", "remainingItemCount": len(rest)}
            self._pages[metadata["continue"]] = (rest, version)
            if len(self._pages) > _PAGES_REMEMBERED:
                del self._pages[next(iter(self._pages))]
        head = {"kind": f"{collection.kind.kind}List", "apiVersion": collection.kind.api_version}
        start = json.dumps({**head, "metadata": metadata}, separators=(",", ":"))[:-1].encode()
        return start + b',"items":[' + b",".join(stored.raw for stored in found[:limit]) + b"]}"

    def _selector(self, asked: Asked) -> Matches | None:
        kind = self.objects.collection(asked.where).kind
        name = asked.where.name
        named: Matches | None = (lambda doc: bool(doc["metadata"]["name"] == name)) if name else None
        selected = both(
            label_selector(asked.params.get("labelSelector", "")),
            field_selector(kind, asked.params.get("fieldSelector", "")),
        )
        return both(named, selected)

    # --- watches ----------------------------------------------------------------------------------------------------

    async def _watch(self, request: web.BaseRequest, asked: Asked) -> web.StreamResponse:
        collection = self.objects.collection(asked.where)
        watch = OpenWatch(asked, self._selector(asked), self.objects.version)
        since = asked.params.get("resourceVersion", "0")
        if since == "0":
            stored = collection.selected(asked.where.namespace, watch.matches)
            watch.pending += [HistoryEntry(one.version, "ADDED", one, None) for one in stored]
        else:
            watch.position = int(since)
            try:
                watch.pending += collection.since(watch.position)
            except Refused as refused:  # as a real server does: the watch begins, and its first event is the error
                return await _only_error(request, refused)
        collection.listeners.append(watch.listen)
        self.watches.add(watch)
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        try:
            await answer.prepare(request)
            with suppress(ConnectionError):
                await self._send_events(watch, answer)
        finally:
            self.watches.discard(watch)
            collection.listeners.remove(watch.listen)
        return answer

    async def _send_events(self, watch: OpenWatch, answer: web.StreamResponse) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + float(watch.asked.params.get("timeoutSeconds", _WATCH_DURATION))
        bookmark_at = clock() + self._bookmark_interval
        while True:
            watch.woken.clear()
            if not watch.pending and not watch.ended:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(min(end, bookmark_at) - clock(), 0)):
                        await watch.woken.wait()
            await self._flowing.wait()
            if watch.pending:
                await self.before_events(watch.asked)
            if watch.ended:
                return
            lines = self._lines(watch)
            if clock() >= min(bookmark_at, end):
                lines.append(self._bookmark(watch))
                bookmark_at = clock() + self._bookmark_interval
            if lines:
                raw = b"".join(lines)
                self.watch_bytes[watch.asked.user, watch.asked.resource] += len(raw)
                await answer.write(raw)
            if clock() >= end:
                return

    def _lines(self, watch: OpenWatch) -> list[bytes]:
        lines, namespace = [], watch.asked.where.namespace
        while watch.pending:
            entry = watch.pending.popleft()
            watch.position = entry.version
            if namespace and entry.new.doc["metadata"].get("namespace") != namespace:
                continue
            if kind := entry.seen_through(watch.matches):
                lines.append(b'{"type":"%s","object":%s}\n' % (kind.encode(), entry.new.raw))
        self.watch_events[watch.asked.user, watch.asked.resource] += len(lines)
        return lines

    def _bookmark(self, watch: OpenWatch) -> bytes:
        kind = self.objects.collection(watch.asked.where).kind
        if not watch.pending:
            watch.position = max(watch.position, self.objects.version)
        metadata = {"resourceVersion": str(watch.position), "creationTimestamp": None}
        doc = {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata}
        return json.dumps({"type": "BOOKMARK", "object": doc}).encode() + b"\n"


async def _only_error(request: web.BaseRequest, refused: Refused) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    await answer.prepare(request)
    await answer.write(json.dumps({"type": "ERROR", "object": refused.status}).encode() + b"\n")
    return answer


def _asked(request: web.BaseRequest) -> Asked:
    at, params = where(request.path), dict(request.query)
    if unknown := params.keys() - _PARAMS:
        raise bad_request(f"the fake server does not know the parameters {sorted(unknown)}")
    user = request.headers.get("Authorization", "").removeprefix("Bearer ")
    match request.method:
        case "GET" if params.get("watch") in {"true", "1"}:
            verb = "watch"
        case "GET":
            verb = "get" if at.name else "list"
        case "POST" | "PUT" | "PATCH" | "DELETE" as method:
            verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]
        case method:
            raise Refused(405, "MethodNotAllowed", f"{method} is not supported")
    if bool(at.name) is (verb == "create") and verb not in {"get", "list", "watch"}:
        raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    return Asked(user, verb, at, params)


def _reviewed(at: Where, body: Doc) -> Doc:
    """Everybody may do everything, and no token is a ServiceAccount's."""
    status: dict[str, Any] = {"authenticated": False} if at.plural == "tokenreviews" else {"allowed": True}
    return {**body, "status": status}


@asynccontextmanager
async def fake_api_server(
    *, namespaces: tuple[str, ...] = ("default",), bookmark_interval: float = 30.0, port: int = 0
) -> AsyncIterator[FakeApiServer]:
    """Runs a server in this loop. Afterwards all its connections are closed."""
    objects = FakeObjects(namespaces, later=asyncio.get_running_loop().call_soon)
    fake = FakeApiServer(objects, bookmark_interval=bookmark_interval)
    runner = web.ServerRunner(web.Server(fake.answer, handler_cancellation=True), shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        fake.go_on()
        fake.break_watches()
        await runner.cleanup()
