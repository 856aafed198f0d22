"""A Kubernetes API server that fails on request: a reverse proxy in front of the real one.

    with FaultProxy(kubeconfig, tmp_path) as proxy:   # runs in a thread: for async and sync tests
        ... KubeApi.connect(ClusterAccess(proxy.kubeconfig)), or `bkpool up --kubeconfig <proxy.kubeconfig>` ...
        proxy.down()                                  # cuts every connection, also every new one
        proxy.up()
        proxy.slow = 2.0                              # seconds before each request is passed on
        proxy.frozen = True                           # watches stay open and send nothing; events are kept
        proxy.refuse(429, times=3, path="/buildkitworkers")
        proxy.lose(method="PUT")                      # passed on and carried out, but never answered
        proxy.expire_watches()                        # ends every open watch; the next one gets 410

The switches may be set from any thread. They take effect at the next request (`frozen`: at the next byte).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp
from aiohttp import web

from bkpool.kube import ClusterAccess, KubeApi

_HOP = {
    "connection",
    "content-length",
    "content-encoding",
    "host",
    "keep-alive",
    "transfer-encoding",
    "accept-encoding",
}
_STEP = 0.02  # seconds between two checks of a switch


@dataclass
class _Rule:
    status: int
    """The status of the answer; 0 if the request is passed on and its answer is lost."""
    times: int
    method: str
    path: str

    def takes(self, request: web.Request) -> bool:
        if self.times <= 0 or self.method not in {"", request.method} or self.path not in request.path_qs:
            return False
        self.times -= 1
        return True


class FaultProxy:
    """See the module.

    `kubeconfig` is a file with the proxy's address. `seen` has every request as "GET /path?query".
    """

    def __init__(self, upstream: Path, directory: Path) -> None:
        self.kubeconfig = directory / "faulty-kubeconfig"
        self.slow = 0.0
        self.frozen = False
        self.seen: list[str] = []
        self._down = False
        self._upstream = upstream
        self._rules: list[_Rule] = []
        self._expiring = 0
        self._open: set[asyncio.Task] = set()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="faults", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        started = self._started.wait(120)
        if self._failure is not None:
            raise self._failure
        assert started, "the proxy has not started: the API server does not answer"
        return self

    def __exit__(self, *_exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    # --- switches --------------------------------------------------------------------------------------------------

    def down(self) -> None:
        self._down = True
        self._cut(lambda _request: True)

    def up(self) -> None:
        self._down = False

    def refuse(self, status: int, *, times: int = 1, method: str = "", path: str = "") -> None:
        """Answers the next requests of this method whose path and query contain `path`, and does not pass them on."""
        self._rules.append(_Rule(status, times, method, path))

    def lose(self, *, times: int = 1, method: str = "", path: str = "") -> None:
        """Passes on the next such requests, and then cuts their connection."""
        self._rules.append(_Rule(0, times, method, path))

    def expire_watches(self) -> None:
        """Cuts every open watch, and answers 410 to as many new ones, as if the server had lost its history."""
        self._expiring = sum(_is_watch(task.request) for task in tuple(self._open))
        self._cut(_is_watch)

    def stop_refusing(self) -> None:
        self._rules.clear()

    @property
    def watches(self) -> int:
        """The number of open watches."""
        return sum(_is_watch(task.request) for task in tuple(self._open))

    # --- the proxy -------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again where the thread was started
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        api = await KubeApi.connect(ClusterAccess(self._upstream))
        self._session = api._session
        runner = web.ServerRunner(
            web.Server(self._handle, access_log=None, handler_cancellation=True), shutdown_timeout=0
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._write_kubeconfig(f"http://127.0.0.1:{runner.addresses[0][1]}", api.namespace)
        self._started.set()
        await self._stop.wait()
        self._cut_here(lambda _request: True)
        await asyncio.gather(*self._open, return_exceptions=True)
        await runner.cleanup()
        await api.close()

    def _write_kubeconfig(self, server: str, namespace: str) -> None:
        context = {"cluster": "faulty", "user": "faulty", "namespace": namespace}
        document = {  # JSON is YAML
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "faulty",
            "clusters": [{"name": "faulty", "cluster": {"server": server}}],
            "contexts": [{"name": "faulty", "context": context}],
            "users": [{"name": "faulty", "user": {}}],
        }
        self.kubeconfig.write_text(json.dumps(document))

    def _cut(self, which: Callable[[web.BaseRequest], bool]) -> None:
        self._loop.call_soon_threadsafe(self._cut_here, which)

    def _cut_here(self, which: Callable[[web.BaseRequest], bool]) -> None:
        for task in self._open:
            if which(task.request):
                task.cancel()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._down:
            return _abort(request)
        self.seen.append(f"{request.method} {request.path_qs}")
        task = asyncio.ensure_future(self._answer(request))
        task.request = request
        self._open.add(task)
        try:
            return await task
        except (asyncio.CancelledError, ConnectionError, aiohttp.ClientError):
            return _abort(request)
        finally:
            self._open.discard(task)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(self.slow)
        rule = next((rule for rule in self._rules if rule.takes(request)), None)
        if rule is not None and rule.status:
            return web.json_response(_status(rule.status), status=rule.status, headers={"Retry-After": "1"})
        if _is_watch(request) and self._expiring > 0:
            self._expiring -= 1
            return web.json_response({"type": "ERROR", "object": _status(410)})
        async with self._passed_on(request) as upstream:
            if rule is not None:
                await upstream.read()
                return _abort(request)
            return await self._relay(request, upstream)

    @asynccontextmanager
    async def _passed_on(self, request: web.BaseRequest) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        forever = aiohttp.ClientTimeout(total=None)
        body = await request.read()
        asking = asyncio.ensure_future(
            self._session.request(
                request.method, request.path_qs, data=body or None, headers=headers, timeout=forever
            )
        )
        try:
            yield await asyncio.shield(asking)
        finally:  # not by cancelling: a TLS connection in its closing handshake would outlive the loop
            upstream = await asyncio.shield(asking)
            if upstream.connection is not None and upstream.connection.transport is not None:
                upstream.connection.transport.abort()
            upstream.close()

    async def _relay(self, request: web.BaseRequest, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP}
        answer = web.StreamResponse(status=upstream.status, headers=headers)
        await answer.prepare(request)
        async for chunk in upstream.content.iter_any():
            while self.frozen and _is_watch(request):  # noqa: ASYNC110 - another thread sets the switch
                await asyncio.sleep(_STEP)
            await answer.write(chunk)
        await answer.write_eof()
        return answer


def _is_watch(request: web.BaseRequest) -> bool:
    return "watch" in request.query


def _abort(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport is not None:
        with suppress(ConnectionError):
            request.transport.abort()
    return web.Response()


def _status(code: int) -> dict:
    """Returns a failure in the format of the API server."""
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": f"made up: {code}"}
