"""Keeps the API's Unix socket in its place: locked against programs that tidy up, and made again if it is removed.

If its directory cannot be made again, the socket is made in the spare one, where commands look for it, too.

The end of a user's session removes XDG_RUNTIME_DIR with all that is in there, while the appliance may run on. Nothing
here knows HTTP, or who may connect.
"""

from __future__ import annotations

import asyncio
import os

import structlog
from aiohttp import web

from bkpool.core.errors import HostFault
from bkpool.home import runtime_directory
from bkpool.home.files import as_host_fault
from bkpool.home.local_socket import SocketPlaces

log = structlog.get_logger(__name__)

_LOOK_INTERVAL = 1.0
"""Seconds between two looks whether the socket is there."""
_BACKLOG = 512


class LocalSite:
    """Serves an application on a Unix socket.

    Args:
        runner: The application.
        places: Of the socket. Their directories are private.
        interval: Seconds between two looks whether it is there.
    """

    def __init__(self, runner: web.BaseRunner, places: SocketPlaces, *, interval: float = _LOOK_INTERVAL) -> None:
        self._runner = runner
        self._places = places
        self._path = places.path
        self._interval = interval
        self._site: web.UnixSite | None = None
        self._lock: int | None = None

    async def start(self) -> None:
        """Begins to listen.

        Raises:
            HostFault: The directory or the socket cannot be made.
        """
        await self._close()
        self._lock = runtime_directory.hold(self._path.parent)
        site = web.UnixSite(self._runner, self._path, backlog=_BACKLOG)
        with as_host_fault(self._path):
            await site.start()
            self._site = site
            self._path.chmod(0o600)

    async def keep(self) -> None:
        """Listens again whenever the socket is gone, until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(self._interval)
                if self._is_gone():
                    await self._start_again()
        finally:
            self._release()

    def _is_gone(self) -> bool:
        return not os.path.lexists(self._path)

    async def _start_again(self) -> None:
        for path in self._places:
            self._path = path
            try:
                runtime_directory.claim(self._path.parent)
                await self.start()
            except HostFault as error:  # the API goes on at its port
                log.warning("api.no_socket", path=str(self._path), reason=error.message, hint=error.hint)
            else:
                log.warning("api.socket_made_again", path=str(self._path))
                return

    async def _close(self) -> None:
        if self._site is not None:
            await self._site.stop()
            self._site = None
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
