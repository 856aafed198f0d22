"""The order in which a process opens its roles, and in which it closes them again.

The store, the gateway and the API are real; the runtime is in memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientSession

from bkpool.appliance import control_replica, host
from bkpool.appliance.access_control import BackendAuthenticators
from bkpool.appliance.backend import Backend, ClusterBackend
from bkpool.appliance.control_replica import ControlReplica
from bkpool.appliance.host import HostAppliance
from bkpool.appliance.roles.gateway import GatewayRole
from bkpool.appliance.run_options import RunOptions
from bkpool.core.documents import Documents
from bkpool.core.errors import HostFault
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.gateway.net.dial import PlainDial
from bkpool.home.files import private_directory
from bkpool.pki.authority import Authority
from bkpool.settings import Settings
from bkpool.store.events import LogRecorder
from bkpool.store.sqlite import SqliteStore
from support.world import TOKEN_KEY, MemoryWorkers

ADMIN = "a" * 43
FREE = ("127.0.0.1", 0)


class StubElection:
    """An election that this replica never wins; it notes when the Lease is given back."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    async def lead(self, _work: Callable[[], Any]) -> None:
        await asyncio.Event().wait()

    async def release(self) -> None:
        self._events.append("Lease given back")


class StubRuntime:
    """A runtime whose workers are in memory."""

    def __init__(self) -> None:
        self.daemons = self.caches = MemoryWorkers()

    async def adopt(self) -> None:
        pass

    async def close(self, *, stop_workers: bool) -> None:
        pass


async def open_backend(stack: AsyncExitStack, home: Path, election: StubElection | None = None) -> Backend:
    store = await SqliteStore.open(home / "state.db")
    stack.push_async_callback(store.close)
    return Backend(
        store=store,
        runtime=StubRuntime(),
        authority=Authority.create(datetime.now(UTC)),
        token_key=TOKEN_KEY,
        dial=PlainDial,
        gateway="local",
        recorder=LogRecorder(),
        authenticators=lambda _pools: BackendAuthenticators(),
        leadership=election,  # type: ignore[arg-type] # the two methods that are called
    )


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    private_directory(tmp_path)
    sections = {"api": {"address": FREE}, "gateway": {"address": FREE}, "metrics": {"address": FREE}}
    return RunOptions(home=tmp_path, cache=tmp_path, settings=Settings.model_validate(sections))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order: roles are noted after they are opened and after they are closed."""
    events: list[str] = []

    def noted(module: Any, role: str) -> None:
        opener = getattr(module, f"open_{role}")

        async def wrapped(stack: AsyncExitStack, *arguments: Any, **more: Any) -> Any:
            stack.callback(events.append, f"{role} closed")
            opened = await opener(stack, *arguments, **more)
            events.append(f"{role} opened")
            return opened

        monkeypatch.setattr(module, f"open_{role}", wrapped)

    for role in ("api", "controller", "gateway"):
        noted(host, role)
    for role in ("api", "controller"):
        noted(control_replica, role)
    return events


async def status_of(url: str) -> int:
    async with ClientSession() as session, session.get(url) as response:
        return response.status


async def test_the_host_drains_the_gateway_while_api_and_controller_still_work(
    options: RunOptions, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    described: dict[str, Any] = {}
    drain = GatewayRole.drain

    async def noted_drain(role: GatewayRole, *arguments: Any) -> None:
        events.append(f"drain: /health {await status_of(described['apiEndpoint'] + '/health')}")
        events.append(f"drain: /ready {await status_of(described['apiEndpoint'] + '/ready')}")
        await drain(role, *arguments)

    monkeypatch.setattr(GatewayRole, "drain", noted_drain)

    def report(description: dict[str, Any]) -> None:
        if "apiEndpoint" in description:
            described.update(description)
            assert (options.home / "appliance.json").exists()
            assert Path(description["apiSocket"]).is_socket()
            os.kill(os.getpid(), signal.SIGTERM)

    appliance = HostAppliance(
        options, Documents(), "process", lambda stack, _report: open_backend(stack, options.home)
    )
    async with asyncio.timeout(60):
        await appliance.run(report)
    assert events == [
        "gateway opened",
        "controller opened",
        "api opened",
        "drain: /health 200",
        "drain: /ready 503",
        "api closed",
        "controller closed",
        "gateway closed",
    ]
    assert not (options.home / "appliance.json").exists()
    assert not Path(described["apiSocket"]).parent.exists()


def _appliance_with(options: RunOptions, sections: dict[str, dict[str, Any]], section: str) -> HostAppliance:
    """An appliance with these settings, whose address of one section was given by BKPOOL_THIS."""
    settings, places = Settings.model_validate(sections), {f"{section}.address": "BKPOOL_THIS"}
    return HostAppliance(
        replace(options, settings=settings, places=places),
        Documents(),
        "process",
        lambda stack, _report: open_backend(stack, options.home),
    )


@pytest.mark.parametrize("section", ["api", "gateway", "metrics", "dev_issuer"])
async def test_a_port_that_is_in_use_names_where_the_user_gave_it(options: RunOptions, section: str) -> None:
    sections: dict[str, dict[str, Any]] = {name: {"address": FREE} for name in ("api", "gateway", "metrics")}
    sections["dev_issuer"] = {"enabled": section == "dev_issuer"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sections[section]["address"] = taken.getsockname()
        appliance = _appliance_with(options, sections, section)
        with pytest.raises(HostFault, match=r"^BKPOOL_THIS: port \d+ on 127\.0\.0\.1 is in use") as caught:
            await appliance.run(lambda _report: None)
    assert caught.value.code == "PortTaken"


@pytest.mark.parametrize("section", ["api", "gateway", "metrics"])
async def test_an_address_of_another_machine_is_one_sentence_with_a_hint(options: RunOptions, section: str) -> None:
    sections: dict[str, dict[str, Any]] = {name: {"address": FREE} for name in ("api", "gateway", "metrics")}
    sections[section]["address"] = ("198.51.100.1", 5000)
    appliance = _appliance_with(options, sections, section)
    message = r"^BKPOOL_THIS: (the gateway )?cannot listen on 198\.51\.100\.1:5000: Cannot assign requested address$"
    with pytest.raises(HostFault, match=message) as caught:
        await appliance.run(lambda _report: None)
    assert caught.value.hint == "Choose an address of this machine."


async def test_the_api_has_the_limits_of_the_settings(options: RunOptions) -> None:
    described: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def report(description: dict[str, Any]) -> None:
        if "apiEndpoint" in description:
            described.set_result(description)

    settings = options.settings
    api = settings.api.model_copy(update={"max_wait": timedelta(seconds=2)})
    appliance = HostAppliance(
        replace(options, settings=settings.model_copy(update={"api": api})),
        Documents(),
        "process",
        lambda stack, _report: open_backend(stack, options.home),
    )
    running = asyncio.create_task(appliance.run(report))
    async with asyncio.timeout(60), ClientSession() as session:
        url = f"{(await described)['apiEndpoint']}/api/v1/workers/allocate"
        bearer = {"Authorization": f"Bearer {(options.home / 'admin.token').read_text().strip()}"}
        async with session.post(url, json={"poolName": "p", "wait": "3s"}, headers=bearer) as answer:
            assert (await answer.json())["error"]["message"] == "the request is not valid: must be at most 2s"
        os.kill(os.getpid(), signal.SIGTERM)
        await running


async def test_a_control_replica_gives_the_lease_back_before_anything_else(
    options: RunOptions, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[ClusterBackend] = []

    async def open_replica_backend(stack: AsyncExitStack, *_more: Any) -> ClusterBackend:
        backend = await open_backend(stack, options.home, StubElection(events))
        await backend.store.create(Pool(metadata=Metadata(name="p")))
        used_by_the_leader: Any = SimpleNamespace(authority=None, daemons=MemoryWorkers())
        opened.append(ClusterBackend(None, used_by_the_leader, backend, used_by_the_leader))  # type: ignore[arg-type]
        return opened[0]

    async def admin_token(*_arguments: Any) -> str:
        return ADMIN

    async def pause(_shutdown: Any, seconds: float) -> None:
        events.append(f"pause of {seconds:g} s: /ready {await status_of(f'http://{addresses[0]}/ready')}")

    addresses: list[str] = []
    opener = control_replica.open_api

    async def open_api(*arguments: Any, **more: Any) -> Any:
        role = await opener(*arguments, **more)
        addresses.append(role.address)
        return role

    monkeypatch.setattr(control_replica, "open_api", open_api)
    monkeypatch.setattr(control_replica, "open_replica_backend", open_replica_backend)
    monkeypatch.setattr(control_replica.kube_secrets, "load_or_create_admin_token", admin_token)
    monkeypatch.setattr("bkpool.appliance.shutdown.Shutdown.pause", pause)

    running = asyncio.create_task(ControlReplica(options).run())
    async with asyncio.timeout(60):
        while "controller opened" not in events:  # noqa: ASYNC110 - the replica announces it in its log only
            await asyncio.sleep(0.01)
        assert await status_of(f"http://{addresses[0]}/ready") == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    assert events == [
        "api opened",
        "controller opened",
        "Lease given back",
        "controller closed",
        "pause of 5 s: /ready 503",
        "api closed",
    ]
