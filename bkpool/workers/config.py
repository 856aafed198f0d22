"""Renders buildkitd.toml for a pool. Pure.

Sizes always have a unit, because buildkitd reads a bare number as bytes. Settings of one slot (root, address, runc)
are on the command line instead, where they also override a file that the user gave.
"""

from __future__ import annotations

import tomllib

from bkpool.core import durations
from bkpool.core.errors import WorkerFailed
from bkpool.core.pool import CacheGC, PoolSpec

GC_DEFAULTS = CacheGC(
    reserved_space="1GB",  # never collected, so that every worker keeps its most used layers when the disk is full
    keep_storage="10GB",  # buildkitd's own default, up to 100 GB, is for one daemon on a machine, not for ten
    min_free_space="5GB",
)
"""What a pool's spec gets where it says nothing about collection and the operator neither."""


def render(spec: PoolSpec, gc_defaults: CacheGC = GC_DEFAULTS) -> str:
    """The configuration file of a worker: `spec.buildkitConfig` if that is given, else one with `spec.cache.gc`.

    Args:
        spec: The pool's spec.
        gc_defaults: What takes the place of fields that `spec.cache.gc` does not have; it has every size.

    Raises:
        WorkerFailed: `spec.buildkitConfig` has a setting that a worker cannot have.
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
        *_collection(spec.cache.gc, gc_defaults),
    ]
    return "\n".join(lines) + "\n"


def _collection(gc: CacheGC, defaults: CacheGC) -> list[str]:
    if not gc.enabled:
        return ["gc = false"]
    # The default of the reserve would override a smaller maximum.
    reserved = gc.reserved_space or (None if gc.keep_storage else defaults.reserved_space)
    sizes = [
        *([f'reservedSpace = "{_size(reserved)}"'] if reserved else []),
        f'maxUsedSpace = "{_size(gc.keep_storage or defaults.keep_storage)}"',
        f'minFreeSpace = "{_size(gc.min_free_space or defaults.min_free_space)}"',
    ]
    longest = defaults.keep_duration if gc.keep_duration is None else gc.keep_duration
    if not longest:
        return ["gc = true", *sizes]
    # These policies replace buildkitd's own: by age, then by size, then by size with buildkitd's internal records.
    policy = "[[worker.oci.gcpolicy]]"
    age = f'keepDuration = "{durations.render(longest)}"'
    return ["gc = true", "", policy, "all = true", age, "", policy, *sizes, "", policy, "all = true", *sizes]


def _size(text: str | None) -> str:
    return (text or "").replace(" ", "")  # buildkitd takes "10 GB" but not "10 %"


def _check(text: str, *, untrusted: bool) -> None:
    """Refuses settings with which buildkitd could never answer, or with which untrusted builds could escape.

    buildkitd itself explains other mistakes better. An address does no harm: the command line overrides it.
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    if untrusted and given.get("insecure-entitlements"):
        raise WorkerFailed(
            "spec.buildkitConfig: insecure-entitlements cannot be set in an untrusted pool",
            hint="Remove them, or spec.untrusted. With them a build can leave its sandbox.",
            field="spec.buildkitConfig",
        )
    grpc = given.get("grpc", {})
    if isinstance(grpc, dict) and "tls" in grpc:
        raise WorkerFailed(
            "spec.buildkitConfig: [grpc.tls] cannot be set",
            hint="Remove it. bkpool itself sets how a worker is reached, and the gateway does TLS.",
            field="spec.buildkitConfig",
        )
