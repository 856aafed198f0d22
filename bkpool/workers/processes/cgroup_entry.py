"""The command line that starts a worker inside its cgroups, so that no cgroup outside of them has a name in there.

The commands are the shell's and util-linux's. Pure: nothing here starts or makes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bkpool.workers.processes.cgroup_tree import Hierarchy
from bkpool.workers.processes.slot_cgroups import LEAF
from bkpool.workers.processes.worker_init import CgroupMount

# "0" means the process that writes it. A score that cannot be set is no reason not to start.
_ENTER = f"""
echo "$0" >/proc/self/oom_score_adj
while [ "$1" != -- ]; do echo 0 >"$1/{LEAF}/cgroup.procs" || exit 1; shift; done
shift
exec "$@"
"""

# A cgroup namespace ends at the cgroups that a process has when it makes the namespace: those of the slot. Only then
# may the process go on into the leaf.
_ENTER_AND_SEPARATE = f"""
echo "$0" >/proc/self/oom_score_adj
for slot; do [ "$slot" = -- ] && break; echo 0 >"$slot/cgroup.procs" || exit 1; done
exec unshare --cgroup sh -c '
    while [ "$1" != -- ]; do echo 0 >"$1/{LEAF}/cgroup.procs" || exit 1; shift; done
    shift
    exec "$@"
' "$0" "$@"
"""


def entering(command: Sequence[str], slots: Iterable[Path], oom_score_adj: int, *, separate: bool) -> list[str]:
    """The command, started in the cgroups of a slot.

    Args:
        command: A program and its arguments.
        slots: The cgroups, which have a LEAF.
        oom_score_adj: How readily the kernel ends it if there is no memory left (proc(5)).
        separate: Whether it gets a cgroup namespace, in which these cgroups are the outermost. Needs root.
    """
    script = _ENTER_AND_SEPARATE if separate else _ENTER
    return ["sh", "-c", script, str(oom_score_adj), *map(str, slots), "--", *command]


def cgroup_mounts(hierarchies: Iterable[Hierarchy]) -> list[CgroupMount]:
    """The mounts of cgroups that a worker needs in its namespace."""
    return [{"target": str(one.mount), "kind": one.kind, "options": one.mount_options} for one in hierarchies]
