"""The appliance on one machine: all three roles in one process.

It opens the roles in order and closes them in the opposite order. Everything is entered into one exit stack as soon
as it is open, so a failed start closes what was opened. It does not know which backend it runs on.
"""

from __future__ import annotations

import json
import os
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from bkpool import __version__
from bkpool.appliance.access_control import open_issuers
from bkpool.appliance.addresses import gateway_address, gateway_hosts
from bkpool.appliance.backend import Backend
from bkpool.appliance.certificate_renewal import CertificateRenewal
from bkpool.appliance.dev_issuer import dev_config, make_dev_issuer
from bkpool.appliance.end_deadline import EndDeadline
from bkpool.appliance.former_life import forget_unseen_endpoints
from bkpool.appliance.http import metrics_app, serve, url_host
from bkpool.appliance.prepare import BackendOpener
from bkpool.appliance.ready_checks import Ask
from bkpool.appliance.reporting import StartupReporter
from bkpool.appliance.roles.api import ApiRole, ApiSources, open_api
from bkpool.appliance.roles.context import ControlState, RoleContext, follow, open_context
from bkpool.appliance.roles.controller import open_controller
from bkpool.appliance.roles.gateway import GatewayRole, open_gateway
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.seed import seed_objects, withdraw_old_registrations
from bkpool.appliance.shutdown import Shutdown, run_until_stopped
from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import Documents
from bkpool.core.errors import HostFault
from bkpool.gateway.control.server import default_threads
from bkpool.home import local_socket
from bkpool.home.files import private_directory, write_private
from bkpool.identity.admin_token import AdminTokenAuthenticator, load_or_create
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


class HostAppliance:
    """One run of the appliance on this machine.

    Args:
        options: How it runs.
        documents: The objects of the user's files.
        backend: The name of the backend.
        open_backend: Opens the backend.
    """

    def __init__(self, options: RunOptions, documents: Documents, backend: str, open_backend: BackendOpener) -> None:
        self._options = options
        self._settings = options.settings
        self._documents = documents
        self._backend_name = backend
        self._open_backend = open_backend

    async def run(self, report: StartupReporter, deadline: EndDeadline | None = None) -> None:
        """Starts everything, serves until it is stopped, and closes everything in the opposite order."""
        await run_until_stopped(lambda stack, shutdown: self._start(stack, shutdown, report), deadline)

    async def _start(self, stack: AsyncExitStack, shutdown: Shutdown, report: StartupReporter) -> None:
        home = self._options.home
        admin = AdminTokenAuthenticator(load_or_create(home))
        context = open_context(stack, self._options, shutdown)
        backend, mirror = await self._open_state(stack, context, report)
        report({"progress": "starting gateway, controller and API"})
        gateway, endpoint = await self._open_gateway(stack, context, backend, mirror)
        state = ControlState(backend, mirror, open_issuers(stack, self._settings.identity))
        # Opened before the API, so that it is closed after it: the controller ends the leases that are released last.
        await open_controller(stack, context, state, endpoint=lambda _pool: endpoint)
        stack.callback(context.checks.add("the disk", _room_on(backend)))
        dev_configs = await self._open_dev_issuer(stack, context)
        stack.callback((home / "appliance.json").unlink, missing_ok=True)
        sources = ApiSources(
            gateway_endpoint=lambda _pool: endpoint,
            connections=lambda pool: gateway.metrics.active(pool.key),
            worker_connections=lambda pool: gateway.metrics.active_by_worker(pool.key),
            unavailable_reason=lambda: "the appliance is stopping" if shutdown.requested.is_set() else mirror.trouble,
            not_ready_reason=context.checks.trouble,
        )
        local = local_socket.prepare(home, os.environ)
        stack.callback(local_socket.remove, home, os.environ)
        api = await open_api(
            stack, context, state, admin=admin, sources=sources, extra_configs=dev_configs, local=local
        )
        where = self._options.where("metrics.address")
        metrics = await serve(stack, metrics_app(context.registry), self._settings.metrics.address, where)
        # These two are entered last, so they come first when it stops: waiting callers are refused, then open builds
        # finish while the API still answers and the controller still works.
        description = self._describe(context, api, local.path, endpoint, metrics)
        if fault := backend.missing_network:
            description["missingNetwork"] = {"message": fault.message, "hint": fault.hint}
        stack.push_async_callback(self._drain, context, gateway, mirror, description)
        stack.callback(api.refuse_waiting, "the appliance is stopping", hint="Try again once it is up.")
        write_private(home / "appliance.json", json.dumps(description).encode())
        log.info("appliance.ready", **description)
        report(description)

    async def _open_state(
        self, stack: AsyncExitStack, context: RoleContext, report: StartupReporter
    ) -> tuple[Backend, Mirror]:
        """The backend with the user's objects in its store, the copy of it, and the workers of an earlier run."""
        backend = await self._open_backend(stack, report)
        for work in backend.background:
            await context.run_in_background(stack, work)
        files_given = bool(self._options.pool_files)
        only_source = backend.only_files and files_given
        removed = await seed_objects(backend.store, self._documents, only_source=only_source, now=context.now())
        for pool in removed:
            what = f"no file names pool {pool} any more, so it is being removed"
            report({"progress": f"note: {what}; `bkpool status` says when its caches are deleted"})
        await withdraw_old_registrations(backend.store, backend.gateway)
        mirror = Mirror(backend.store, configs=True, heartbeats=True)
        await follow(stack, context, backend.store, mirror)
        report({"progress": "looking for workers of an earlier run"})
        await backend.runtime.adopt()
        await forget_unseen_endpoints(backend.store, mirror, backend.runtime.daemons.observe())
        return backend, mirror

    async def _open_gateway(
        self, stack: AsyncExitStack, context: RoleContext, backend: Backend, mirror: Mirror
    ) -> tuple[GatewayRole, str]:
        """The gateway, and the endpoint that callers get."""
        options = self._options
        private_directory(options.home / "pki")
        certificate = CertificateRenewal(
            directory=options.home / "pki",
            authority=backend.authority,
            former=backend.former,
            mirror=mirror,
            hosts=gateway_hosts(options),
            hosts_from=options.where("gateway.hosts"),
            now=context.now,
            recorder=backend.recorder,
            life=self._settings.certificates.server_life,
        )
        gateway = await open_gateway(
            stack,
            context,
            backend.store,
            mirror,
            name=backend.gateway,
            certificate=certificate,
            dial=backend.dial,
            address=gateway_address(self._options),
            threads=default_threads(cores_each=2),  # clients and workers are on this machine too
            # Another appliance that leads may be of an earlier version, and the rights here are those of a person.
            followed=lambda: backend.leadership is None or backend.leadership.leading,
        )
        host = next(iter(gateway_hosts(options)), "localhost")
        return gateway, f"tcp://{url_host(host)}:{gateway.port}"

    async def _open_dev_issuer(self, stack: AsyncExitStack, context: RoleContext) -> tuple[OIDCConfig, ...]:
        """The development issuer if the user asked for it, and the configuration that trusts it.

        The configuration is in no object, so the issuer is trusted only while it runs.
        """
        options = self._options
        if options.dev_issuer_url is None:
            return ()
        app = make_dev_issuer(options.dev_issuer_url, context.now, options.audience)
        await serve(stack, app, self._settings.dev_issuer.address, options.where("dev_issuer.address"))
        return (dev_config(options.dev_issuer_url, self._settings.kubernetes.namespace),)

    async def _drain(
        self, context: RoleContext, gateway: GatewayRole, mirror: Mirror, description: dict[str, Any]
    ) -> None:
        """Accepts nothing new and lets open builds finish, until the drain time-out or a second signal."""
        busy = any(gateway.metrics.active(key) for key in mirror.pools)
        timeout = self._settings.appliance.drain_timeout
        self._describe_drain(description, context.now(), timeout)
        log.info("appliance.draining", seconds=timeout.total_seconds(), busy=busy)
        await gateway.drain(timeout.total_seconds(), context.shutdown)
        if busy and not context.shutdown.forced.is_set():
            await context.shutdown.pause(self._settings.appliance.release_grace.total_seconds())
        context.shutdown.drained()

    def _describe_drain(self, description: dict[str, Any], now: datetime, timeout: timedelta) -> None:
        """Adds to `appliance.json` that it drains and until when, for `bkpool down` and `bkpool up`."""
        until = {"since": now.isoformat(timespec="seconds"), "until": (now + timeout).isoformat(timespec="seconds")}
        try:
            write_private(
                self._options.home / "appliance.json", json.dumps({**description, "draining": until}).encode()
            )
        except HostFault as fault:  # the disk may be full; the drain itself needs no file
            log.warning("appliance.drain_not_described", error=fault.message)

    def _describe(
        self, context: RoleContext, api: ApiRole, local: Path, endpoint: str, metrics: str
    ) -> dict[str, Any]:
        """What `appliance.json` says."""
        options = self._options
        return {
            "pid": os.getpid(),
            "backend": self._backend_name,
            "version": __version__,
            "apiEndpoint": f"{options.api_scheme}://{api.address}",
            "apiSocket": str(local),
            **api.tls_description,
            "gatewayEndpoint": endpoint,
            "metricsEndpoint": f"http://{metrics}/metrics",
            **({"devIssuer": options.dev_issuer_url} if options.dev_issuer_url else {}),
            "startedAt": context.now().isoformat(timespec="seconds"),
            "draining": None,
        }


def _room_on(backend: Backend) -> Ask:
    async def ask() -> None:
        if full := backend.full_disk():
            raise full

    return ask
