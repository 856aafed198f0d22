"""The limit of open file descriptors of this process: raised at the start, and not for the programs that it starts.

Most systems start programs with a soft limit of 1024 (setrlimit(2)), which a few clients can use up. Old programs in
a build step may break under a high soft limit, so workers get the one with which the appliance was started.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass

from bkpool.core.errors import HostFault

HIGHEST = 1 << 20
"""The kernel's own default for the highest limit (fs.nr_open, proc_sys_fs(5))."""
FEW = 4096
"""With fewer descriptors the servers get fewer connections than their settings say."""
MORE_DESCRIPTORS = "Raise the hard limit (ulimit -Hn, or LimitNOFILE= of the unit), or run fewer workers."
"""The hint of each error about a lack of descriptors."""


@dataclass(frozen=True, slots=True)
class DescriptorLimit:
    """The limits of a process; -1 stands for none."""

    soft: int
    hard: int
    at_start: int
    """The soft limit before it was raised."""


_at_start: list[int] = []  # one number, when the limit was raised


def raise_limit() -> DescriptorLimit:
    """Raises the soft limit of this process to its hard limit, or to HIGHEST if that is less. It never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _at_start[:] = _at_start or [soft]
    wanted = highest(hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # a sandbox may forbid it: the servers share what there is
            pass
        else:
            soft = wanted
    return DescriptorLimit(soft, hard, _at_start[0])


def current_limit() -> int:
    """How many descriptors this process may have open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return highest(soft)


def free_descriptors() -> int:
    """How many descriptors this process can still open. It takes 5 ms where 10,000 are open."""
    try:
        with os.scandir("/proc/self/fd") as open_now:
            return current_limit() - sum(1 for _ in open_now) + 1  # without the one that lists the directory
    except OSError:
        return 0


def or_too_many_open_files(fault: HostFault) -> HostFault:
    """The same error, with the limit as its hint if a program that failed has said that it has no descriptor left."""
    if os.strerror(errno.EMFILE) not in fault.message:
        return fault
    return HostFault(fault.message, hint=MORE_DESCRIPTORS, code="TooManyOpenFiles")


def is_lack_of_descriptors(error: OSError) -> bool:
    """Whether this process, or the whole machine, has no descriptor left."""
    return error.errno in {errno.EMFILE, errno.ENFILE}


def too_many_open_files(what: str) -> HostFault:
    """The error for something that failed because no descriptor was left."""
    return HostFault(
        f"{what}: there are too many open files, the limit is {current_limit()}",
        hint=MORE_DESCRIPTORS,
        code="TooManyOpenFiles",
    )


def highest(limit: int) -> int:
    """The limit as a number of descriptors: HIGHEST if there is none, or if it is higher."""
    return HIGHEST if limit == resource.RLIM_INFINITY else min(limit, HIGHEST)


def with_limit_at_start(command: Sequence[str]) -> list[str]:
    """A command that runs with the soft limit with which this process was started. The hard limit stays.

    buildkitd is written in Go: it raises its own soft limit, and gives its children the one that it was started with.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not _at_start or _at_start[0] == soft:
        return list(command)
    return ["/bin/sh", "-c", 'ulimit -Sn "$0" && exec "$@"', str(_at_start[0]), *command]
