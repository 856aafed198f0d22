"""Strategies of hypothesis for settings and their valid values."""

import string
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from bkpool.core.allowances import Allowed
from bkpool.core.names import Key
from bkpool.settings import kinds
from bkpool.settings.catalogue import all_settings
from bkpool.settings.kinds import Address

TEXTS = st.text(st.sampled_from(string.ascii_letters + string.digits + "/.-_é\"'\\ #"), min_size=1)
NAMES = st.from_regex("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)
VALUES = {
    kinds.SWITCH: st.booleans(),
    kinds.ADDRESS: st.builds(Address, st.sampled_from(["127.0.0.1", "::1", "host.example"]), st.integers(0, 65535)),
    kinds.TEXT: TEXTS,
    kinds.NAME: NAMES,
    kinds.URL: st.sampled_from(["https://builds.example.com:8082", "http://[::1]:8082", "https://a.example/bkpool"]),
    kinds.NAMES: st.lists(NAMES, max_size=3).map(tuple),
    kinds.FILE: TEXTS.map(lambda text: Path("/") / text),
    kinds.SIZE: st.sampled_from(["1MB", "1.5GiB", "1024kB", "3G", "1PB", "1%", "100%"]),
    kinds.POOL: st.builds(Key, st.sampled_from(["default", "team-a"]), st.sampled_from(["default", "x"])),
    kinds.TEXTS: st.lists(TEXTS, max_size=3).map(tuple),
    kinds.FILES: st.lists(TEXTS.map(lambda text: Path("/") / text), max_size=3).map(tuple),
    kinds.ALLOWED_HOSTS: st.lists(
        st.builds(Allowed, NAMES, st.sampled_from(["build.example.com", "192.0.2.7", "2001:db8::7"])), max_size=3
    ).map(tuple),
    kinds.ALLOWED_IMAGES: st.lists(
        st.builds(Allowed, NAMES, st.sampled_from(["registry.example.com:5000/*", "moby/buildkit:v?.*"])), max_size=3
    ).map(tuple),
    kinds.ROLES: st.sets(st.sampled_from(["api", "controller", "gateway"]), min_size=1).map(frozenset),
}


@st.composite
def any_value(draw: st.DrawFn) -> tuple[Any, Any]:
    """Draws a setting and a valid value of it."""
    one = draw(st.sampled_from(list(all_settings().values())))
    if one.kind in VALUES:
        return one, draw(VALUES[one.kind])
    lowest, highest = bounds(one)
    if one.kind is kinds.COUNT:
        return one, draw(st.integers(lowest, highest))
    milliseconds = st.integers(lowest // timedelta(milliseconds=1), highest // timedelta(milliseconds=1))
    return one, draw(milliseconds.map(lambda number: timedelta(milliseconds=number)))


def bounds(one: Any) -> tuple[Any, Any]:
    metadata = one._info.metadata
    return (next(m.ge for m in metadata if hasattr(m, "ge")), next(m.le for m in metadata if hasattr(m, "le")))
