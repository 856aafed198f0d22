"""Renders buildkitd.toml for a pool: ours, with the pool's `spec.buildkitConfig` merged into it key by key. Pure.

What the safety of a pool depends on is never taken from there, and is named for the user. Sizes always have a unit,
because buildkitd reads a bare number as bytes. Settings of one slot (root, address, runc) are on the command line.
"""

from __future__ import annotations

import tomllib
from typing import Any

import tomli_w

from bkpool.core.errors import WorkerFailed
from bkpool.core.pool import CacheGC, PoolSpec
from bkpool.workers.collection import GC_DEFAULTS, Table, collection

__all__ = ["GC_DEFAULTS", "not_taken", "render"]

_FIELD = "spec.buildkitConfig"
_NEVER_TAKEN = (
    "root",  # of the slot
    "grpc",  # how a worker is reached
    "otel",  # a socket of the slot
    "worker.containerd",  # a second worker, outside of the slot's limits
    "worker.oci.enabled",
    "worker.oci.rootless",  # how a worker is isolated
    "worker.oci.noProcessSandbox",
    "worker.oci.userRemapUnsupported",
    "worker.oci.binary",
    "worker.oci.proxySnapshotterPath",  # a program outside that makes mounts for builds
    "worker.oci.defaultCgroupParent",
    "worker.oci.networkMode",  # the network of a worker, and programs that would change it
    "worker.oci.cniConfigPath",
    "worker.oci.cniBinaryPath",
    "worker.oci.cniPoolSize",
    "worker.oci.bridgeName",
    "worker.oci.bridgeSubnet",
)
_NOT_OF_UNTRUSTED = ("cdi",)  # devices of the machine
_TABLES = ("worker", "worker.oci", "cdi")
_COLLECTION = tuple(
    f"worker.oci.{key}"
    for key in ("gc", "gckeepstorage", "reservedSpace", "maxUsedSpace", "minFreeSpace", "gcpolicy")
)
_NAMES = {path.lower(): path for path in (*_NEVER_TAKEN, *_TABLES, *_COLLECTION, "insecure-entitlements", "grpc.tls")}


def render(spec: PoolSpec, gc_defaults: CacheGC = GC_DEFAULTS) -> str:
    """The configuration file of a worker.

    Args:
        spec: The pool's spec.
        gc_defaults: What takes the place of fields that `spec.cache.gc` does not have; it has every size.

    Raises:
        WorkerFailed: `spec.buildkitConfig` cannot be read, or has a setting that a worker cannot have.
    """
    text = tomli_w.dumps(_merged(spec, gc_defaults)[0])
    return f"# Written by bkpool. spec.buildkitConfig of the pool is merged into it.\n{text}"


def not_taken(spec: PoolSpec, gc_defaults: CacheGC = GC_DEFAULTS) -> list[str]:
    """The paths below `spec` of what `render` does not take from `spec.buildkitConfig`, sorted.

    Args:
        spec: The pool's spec. If it cannot be rendered, there are none.
        gc_defaults: As for `render`.
    """
    try:
        return sorted(f"buildkitConfig.{path}" for path in _merged(spec, gc_defaults)[1])
    except WorkerFailed:
        return []


def _merged(spec: PoolSpec, gc_defaults: CacheGC) -> tuple[Table, list[str]]:
    given = _parsed(spec.buildkit_config or "")
    _check(given, untrusted=spec.untrusted)
    refused = [
        path for path in (*_NEVER_TAKEN, *(_NOT_OF_UNTRUSTED if spec.untrusted else ())) if _removed(given, path)
    ]
    worker = given.setdefault("worker", {})
    keys, too_much = collection(spec.cache.gc, gc_defaults, worker.get("oci", {}))
    kept = {key: value for key, value in worker.get("oci", {}).items() if f"worker.oci.{key}" not in _COLLECTION}
    worker["oci"] = {**kept, **keys}
    given["cdi"] = {"disabled": True, **given.get("cdi", {})}
    return given, [*refused, *(f"worker.oci.{key}" for key in too_much)]


def _parsed(text: str) -> Table:
    """The file with the names that are looked for here as buildkitd's documentation writes them."""
    try:
        given = _with_known_names(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise WorkerFailed(
            f"{_FIELD} is not TOML: {error}", hint="Correct that line of the pool's spec.", field=_FIELD
        ) from None
    for path in _TABLES:
        holder, _, name = path.rpartition(".")
        if not isinstance((given.get(holder, {}) if holder else given).get(name, {}), dict):
            raise WorkerFailed(
                f"{_FIELD}: {path} must be a table", hint=f"Write [{path}] on a line of its own.", field=_FIELD
            )
    return given


def _with_known_names(table: Table, above: str = "") -> Table:
    """Buildkitd accepts a name in any case, and of two that differ in it only it takes the last."""
    renamed: Table = {}
    for key, value in table.items():
        path = _NAMES.get(_lower(f"{above}{key}")) if "." not in key else None
        name = path.rpartition(".")[2] if path else key
        inner: Any = _with_known_names(value, f"{above}{name}.") if path and isinstance(value, dict) else value
        renamed[name] = _joined(renamed.get(name), inner)
    return renamed


def _lower(name: str) -> str:
    """The name as Go's strings.ToLower writes it: for "İ" that is one letter, where Python has two."""
    return "".join(letter.lower()[0] for letter in name)


def _joined(before: object, after: object) -> object:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    return before | {name: _joined(before.get(name), value) for name, value in after.items()}


def _removed(given: Table, path: str) -> bool:
    """Removes a key or a table, and says whether it was there."""
    *holders, name = path.split(".")
    table = given
    for holder in holders:
        table = table.get(holder, {})
    return table.pop(name, None) is not None


def _check(given: Table, *, untrusted: bool) -> None:
    """Refuses settings that the user must learn of at once: without them, their builds or clients would fail."""
    if untrusted and given.get("insecure-entitlements"):
        raise WorkerFailed(
            f"{_FIELD}: insecure-entitlements cannot be set in an untrusted pool",
            hint="Remove them, or spec.untrusted. With them a build can leave its sandbox.",
            field=_FIELD,
        )
    grpc = given.get("grpc", {})
    if isinstance(grpc, dict) and "tls" in grpc:
        raise WorkerFailed(
            f"{_FIELD}: [grpc.tls] cannot be set",
            hint="Remove it. bkpool itself sets how a worker is reached, and the gateway does TLS.",
            field=_FIELD,
        )
