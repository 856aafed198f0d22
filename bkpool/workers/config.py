"""Writes buildkitd.toml for a pool.

Sizes always carry a unit: buildkitd reads a bare number as bytes. What belongs to one slot (root, address, runc) is
no part of the file but on the command line, where it also wins over a file that the user gave.
"""

from __future__ import annotations

import tomllib

from bkpool.core import durations
from bkpool.core.errors import WorkerFailed
from bkpool.core.pool import CacheGC, PoolSpec

_RESERVED = "1GB"  # never collected, so that a full disk leaves every worker its hottest layers
_MAX_USED = "10GB"  # buildkitd's own default, up to 100 GB, is meant for one daemon on a machine, not for ten
_MIN_FREE = "5GB"


def render(spec: PoolSpec, cgroup_parent: str | None) -> str:
    """The configuration file of a worker: the user's own, or one made of `spec.cache.gc`.

    Args:
        spec: Of the pool.
        cgroup_parent: The cgroup that holds the containers of this slot; None: buildkitd's own choice.

    Raises:
        WorkerFailed: The user's file asks for what can't be on a worker.
    """
    if spec.buildkit_config is not None:
        _check(spec.buildkit_config, untrusted=spec.untrusted)
        return spec.buildkit_config
    lines = [
        "# Written by bkpool at each start of the worker; spec.buildkitConfig of the pool replaces it.",
        "[cdi]",
        "disabled = true",
        "",
        "[worker.oci]",
        *([f'defaultCgroupParent = "{cgroup_parent}"'] if cgroup_parent else []),
        *_collection(spec.cache.gc),
    ]
    return "\n".join(lines) + "\n"


def _collection(gc: CacheGC) -> list[str]:
    if not gc.enabled:
        return ["gc = false"]
    reserved = gc.reserved_space or (None if gc.keep_storage else _RESERVED)  # it would win over a smaller maximum
    sizes = [
        *([f'reservedSpace = "{_size(reserved)}"'] if reserved else []),
        f'maxUsedSpace = "{_size(gc.keep_storage or _MAX_USED)}"',
        f'minFreeSpace = "{_size(gc.min_free_space or _MIN_FREE)}"',
    ]
    if gc.keep_duration is None:
        return ["gc = true", *sizes]
    # Policies of one's own replace buildkitd's: first by age, then by size, then by size with its internal records.
    policy = "[[worker.oci.gcpolicy]]"
    age = f'keepDuration = "{durations.render(gc.keep_duration)}"'
    return ["gc = true", "", policy, "all = true", age, "", policy, *sizes, "", policy, "all = true", *sizes]


def _size(text: str) -> str:
    return text.replace(" ", "")  # buildkitd takes "10 GB" but not "10 %"


def _check(text: str, *, untrusted: bool) -> None:
    """Refuses what would keep buildkitd from ever answering, or let strangers out of it.

    Any other mistake buildkitd explains better itself. An address in it does no harm: the command line's wins.
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    if untrusted and given.get("insecure-entitlements"):
        raise WorkerFailed(
            "spec.buildkitConfig: insecure-entitlements can't be set in an untrusted pool",
            hint="Remove them, or spec.untrusted: with them a build may leave its sandbox.",
            field="spec.buildkitConfig",
        )
    grpc = given.get("grpc", {})
    if isinstance(grpc, dict) and "tls" in grpc:
        raise WorkerFailed(
            "spec.buildkitConfig: [grpc.tls] can't be set",
            hint="Remove it: bkpool itself says how a worker is reached, and the gateway does the TLS.",
            field="spec.buildkitConfig",
        )
