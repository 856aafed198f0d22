"""The API over a small world (support.world), served as the appliance serves it, and a client for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession
from aiohttp.web import BaseRunner
from multidict import CIMultiDictProxy

from bkpool.allocation import PoolRemover, Revoker
from bkpool.api import ApiLimits, ApiMetrics, HttpLimits, Service, listen, make_app, open_runner
from bkpool.core.errors import DiskFull
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import RememberedCaller
from bkpool.identity import Authenticator, Identity, Verdict
from bkpool.identity.access import AccessControl
from bkpool.identity.admin_token import AdminTokenAuthenticator
from bkpool.identity.static_tokens import FileTokenReader, StaticTokenAuthenticator, TokenReader
from bkpool.store.mirror import Mirror
from bkpool.telemetry.registry import new_registry
from support.world import World, running_world

ADMIN = "a" * 43
ALLOCATE = "/api/v1/workers/allocate"


class StubAuthenticator:
    """Recognises callers by the tokens that a test gives them."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Identity, ...]] = {}
        self.refused: dict[str, str] = {}

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:
        if bearer in self.refused:
            return (Verdict("stub", refusal=self.refused[bearer]),)
        return tuple(Verdict(one.source, one) for one in self.known.get(bearer, ()))

    async def recall(self, caller: RememberedCaller, pool: Pool) -> tuple[Verdict, ...]:
        return ()  # its callers have no method, so leases remember only their names


class Api:
    """One replica's API."""

    def __init__(self, world: World, host: str, port: int, session: ClientSession) -> None:
        self.world = world
        self.host, self.port = host, port
        self.session = session
        self.authenticator = StubAuthenticator()
        self.trouble: str | None = None
        self.full: DiskFull | None = None
        self.before_answer: Callable[[], None] = lambda: None
        """Called when a lease is ready, just before its answer is written."""
        self.runner: BaseRunner
        self.registry = new_registry()

    async def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        bearer: str | None = ADMIN,
    ) -> tuple[int, Any, CIMultiDictProxy[str]]:
        if headers is None:
            headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        url = f"http://{self.host}:{self.port}{path}"
        async with self.session.request(method, url, json=body, data=data, headers=headers) as answer:
            return answer.status, await answer.json(), answer.headers

    async def raw(self, request: bytes, seconds: float = 60, until: bytes = b"\0") -> bytes:
        """Sends these bytes and returns the response, empty if they make no request within `seconds`."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        answer = b""
        try:
            writer.write(request)
            async with asyncio.timeout(seconds):
                while not answer.endswith(until) and (part := await reader.read(65_536)):
                    answer += part
        except (ConnectionError, TimeoutError):
            pass  # refused before all of it was sent, or not complete
        finally:
            writer.close()
        return answer


@asynccontextmanager
async def running_api(
    directory: Path,
    limits: ApiLimits = ApiLimits(),  # noqa: B008
    http: HttpLimits = HttpLimits(),  # noqa: B008
    reader: TokenReader | None = None,
    make_authenticators: Callable[[Mirror], Sequence[Authenticator]] = lambda _mirror: (),
    *,
    only_files: bool = True,
    others_timeout: float = 60.0,
) -> AsyncIterator[Api]:
    """One replica's API.

    Args:
        directory: For the store.
        limits: Of the API.
        reader: Reads the tokens of pools; None: nobody has such a token.
        make_authenticators: Makes authenticators to ask besides `Api.authenticator`.
        only_files: Whether pools come from files; False: they are custom resources.
        others_timeout: Seconds that a caller waits for the tokens of pools that they did not ask for.
    """
    async with running_world(directory) as world, AsyncExitStack() as stack:
        replica = world.replicas[0]
        api = Api(world, "127.0.0.1", 0, await stack.enter_async_context(ClientSession()))
        pools = replica.mirror.pools.values
        signed = (api.authenticator, *make_authenticators(replica.mirror))
        if isinstance(reader, FileTokenReader):
            stack.callback(reader.close)
        static = () if reader is None else (StaticTokenAuthenticator(reader, pools, others_timeout),)
        revoker = Revoker(store=world.store, mirror=replica.mirror, leases=replica.leases)

        def gateway_endpoint(_pool: Pool) -> str:
            api.before_answer()
            return "tcp://localhost:1235"

        service = Service(
            allocator=replica.allocator,
            leases=replica.leases,
            revoker=revoker,
            remover=PoolRemover(
                store=world.store, mirror=replica.mirror, revoker=revoker, now=world.clock, only_files=only_files
            ),
            mirror=replica.mirror,
            access=AccessControl(
                ((AdminTokenAuthenticator(ADMIN),), signed, static),
                replica.mirror.pools.values,
                replica.mirror.configs.values,
            ),
            now=world.clock,
            gateway_endpoint=gateway_endpoint,
            connections=lambda _pool: 0,
            unavailable_reason=lambda: api.trouble,
            full_disk=lambda: api.full,
            limits=limits,
        )
        metrics = ApiMetrics(
            api.registry,
            waiting=replica.allocator.waiting,
            pools=replica.mirror.pools,
            workers=replica.mirror.workers,
        )
        api.runner = await open_runner(stack, make_app(service, metrics), shutdown_timeout=0, limits=http)
        _, api.port = await listen(api.runner, "127.0.0.1", 0)
        yield api


def status_and_code(answer: Any) -> tuple[int, str]:
    """Returns the HTTP status and the error code of a response."""
    return answer[0], answer[1]["error"]["code"]
