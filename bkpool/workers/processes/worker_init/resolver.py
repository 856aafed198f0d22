"""The host's resolv.conf, which a worker sees with other name servers in it. It resolves no name."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from .host_facts import nameservers, worker_resolv_conf
from .kernel import MS_BIND, checked, fail, libc

_RESOLV_CONF = Path("/etc/resolv.conf")
_SECONDS = 5.0  # between two looks at the file, while the kernel tells of no change
_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE = 0x8, 0x80, 0x100  # inotify(7)


class HostResolver:
    """What the host's resolv.conf says now, although the worker sees another one in its place.

    Args:
        replacement: The file that the worker shall see.
    """

    def __init__(self, replacement: Path) -> None:
        self._replacement = replacement
        try:
            self._file = _RESOLV_CONF.open()
        except OSError as error:  # without it, builds would ask no name server, or one that nobody chose
            fail(f"{_RESOLV_CONF} of this machine cannot be read: {error.strerror}")
        self.servers = self._replace()

    def follow(self) -> None:
        """Reads it again whenever it changes. Returns never.

        If the host replaces its file, the kernel removes our mount on it.
        """
        changes = _watch()
        while True:
            if changes is None:
                time.sleep(_SECONDS)
                changes = _watch()
            else:
                os.read(changes, 4096)
            with suppress(OSError):  # it is not there for a moment
                if not _RESOLV_CONF.samefile(self._replacement):
                    self._file.close()
                    self._file = _RESOLV_CONF.open()
                    self.servers = self._replace()
                else:
                    self.servers = nameservers(self._text())

    def _replace(self) -> list[str]:
        text = self._text()
        self._replacement.write_text(worker_resolv_conf(text))
        self._replacement.chmod(0o644)  # steps read a copy of it
        mounted = libc.mount(bytes(self._replacement), bytes(_RESOLV_CONF.resolve()), None, MS_BIND, None)
        checked(mounted, str(_RESOLV_CONF))
        return nameservers(text)

    def _text(self) -> str:
        self._file.seek(0)
        return self._file.read()


def _watch() -> int | None:
    """A descriptor that can be read after a change in the directory of resolv.conf.

    Returns:
        None if the kernel has none left. It counts them for each user of the machine, and as root the steps of every
        build are the same user, so a build can take them all. The worker must start all the same.
    """
    changes = int(libc.inotify_init1(os.O_CLOEXEC))
    if changes < 0:
        return None
    directory = bytes(_RESOLV_CONF.resolve().parent)
    if libc.inotify_add_watch(changes, directory, _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE) < 0:
        os.close(changes)
        return None
    return changes
