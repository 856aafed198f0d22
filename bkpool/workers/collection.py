"""What buildkitd's garbage collection keeps: the pool's `spec.cache.gc`, and what its own buildkitd.toml may change.

A pool's file may only let less be kept than its spec says. Pure.
"""

from __future__ import annotations

import re
from typing import Any

from bkpool.core import disk_size, durations
from bkpool.core.disk_size import DiskSize
from bkpool.core.pool import CacheGC

GC_DEFAULTS = CacheGC(
    reserved_space="1GB",  # never collected, so that every worker keeps its most used layers when the disk is full
    keep_storage="10GB",  # buildkitd's own default, up to 100 GB, is for one daemon on a machine, not for ten
    min_free_space="5GB",
)
"""What a pool's spec gets where it says nothing about collection and the operator neither."""

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?((?P<unit>[kmgtp])?i?b?|(?P<share>%))", re.IGNORECASE)
_KEYS = ("gc", "gckeepstorage", "reservedSpace", "maxUsedSpace", "minFreeSpace", "gcpolicy")

Table = dict[str, Any]


def collection(gc: CacheGC, defaults: CacheGC, given: Table) -> tuple[Table, list[str]]:
    """The keys of `[worker.oci]` about collection.

    Args:
        gc: The pool's `spec.cache.gc`.
        defaults: What takes the place of fields that `gc` does not have; it has every size.
        given: `[worker.oci]` of the pool's own buildkitd.toml. Its policies come before the pool's, so they can only
            let more be collected.

    Returns:
        The keys, and the names of the given ones that would let more be kept.
    """
    own = {key: given[key] for key in _KEYS if key in given}
    if not gc.enabled:
        return {"gc": False, **own}, []
    sizes = _sizes(gc, defaults)
    refused = []
    for key, value in own.items():
        if key in sizes or key == "reservedSpace":
            limit = sizes["maxUsedSpace"] if key == "reservedSpace" else sizes[key]
            allowed = _is_at_most(limit, value) if key == "minFreeSpace" else _is_at_most(value, limit)
            if allowed:
                sizes[key] = value
            else:
                refused.append(key)
        elif key == "gckeepstorage" or (key == "gc" and value is not True):
            refused.append(key)  # the older name of a size that is always set here, or no collection at all
    if {"reservedSpace", "maxUsedSpace"} & own.keys() == {"maxUsedSpace"} and "maxUsedSpace" not in refused:
        sizes.pop("reservedSpace", None)  # the default of the reserve would override a smaller maximum
    policies = own.get("gcpolicy", [])
    if not isinstance(policies, list):
        policies, refused = [], [*refused, "gcpolicy"]
    longest = defaults.keep_duration if gc.keep_duration is None else gc.keep_duration
    by_age = [{"all": True, "keepDuration": durations.render(longest)}] if longest else []
    if not policies and not by_age:
        return {"gc": True, **sizes}, refused
    # These policies replace buildkitd's own: by age, then by size, then by size with buildkitd's internal records.
    return {"gc": True, "gcpolicy": [*policies, *by_age, sizes, {"all": True, **sizes}]}, refused


def _sizes(gc: CacheGC, defaults: CacheGC) -> dict[str, Any]:
    # The default of the reserve would override a smaller maximum.
    reserved = gc.reserved_space or (None if gc.keep_storage else defaults.reserved_space)
    return {
        **({"reservedSpace": _size(reserved)} if reserved else {}),
        "maxUsedSpace": _size(gc.keep_storage or defaults.keep_storage),
        "minFreeSpace": _size(gc.min_free_space or defaults.min_free_space),
    }


def _size(text: str | None) -> str:
    return disk_size.for_buildkitd(text or "0B")


def _is_at_most(size: object, limit: object) -> bool:
    """Whether one size is not larger than another. A share of the disk cannot be compared with a number of bytes."""
    one, other = _parsed(size), _parsed(limit)
    if one is None or other is None or not (one.fits and other.fits):
        return False
    return one.is_share == other.is_share and one.amount <= other.amount


def _parsed(size: object) -> DiskSize | None:
    """A size as buildkitd reads it: its units may be in any case, and a number without one is bytes."""
    found = _SIZE.fullmatch(str(size)) if isinstance(size, int | str) and not isinstance(size, bool) else None
    if found is None:
        return None
    power = "kmgtp".index(found["unit"].lower()) + 1 if found["unit"] else 0
    return DiskSize(disk_size.number(found["number"]) * 1024**power, found["share"] is not None)
