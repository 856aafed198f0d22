"""`nox -s soak`: ten thousand connections, then builds for the rest of the time. Afterwards nothing may have grown.

usage: nox -s soak [-- --minutes N] [-- --connections N]     It does not judge speed. See
docs/testing.md.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from soak import builds, connections
from soak.growth import Row, table

from support.environment import forget_settings

LEAST = 20.0
"""The fewest seconds of builds, also if the connections took long."""
EVERY = 3.0
"""Seconds between two lines of progress."""


class Progress:
    """Prints progress: on a terminal in one line that changes, elsewhere as a new line every few seconds."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self._terminal:
            print(f"\r\033[K{now - self._begun:5.0f} s  {text}", end="", flush=True)
        elif now - self._told >= EVERY:
            self._told = now
            print(f"{now - self._begun:5.0f} s  {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=connections.CONNECTIONS)
    options = parser.parse_args()
    forget_settings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the appliance ends too
    begun, report = time.monotonic(), Progress()
    base = Path(tempfile.mkdtemp(prefix="bkpool-soak-"))
    print(
        f"soak: {options.connections} connections, then builds, {options.minutes:g} min in all; in {base}", flush=True
    )
    (base / "connections").mkdir()
    (base / "builds").mkdir()
    first = connections.soak(base / "connections", options.connections, report)
    left = max(LEAST, options.minutes * 60 - (time.monotonic() - begun))
    second, wrong = builds.soak(base / "builds", left, report)
    grown = [*_shown("the gateway, before and after its connections", first)]
    grown += _shown("the appliance, before and after its builds", second)
    for text in (*grown, *wrong):
        print(f"VIOLATION {text}")
    if grown or wrong:
        print(f"files of this run: {base}")
        return 1
    shutil.rmtree(base)
    print("nothing has grown")
    return 0


def _shown(title: str, rows: list[Row]) -> list[str]:
    print(f"\n{title}\n{table(rows)}\n", flush=True)
    return [f"{title}: {row.name} grew by {row.grown:g} (from {row.before:g})" for row in rows if not row.well]


if __name__ == "__main__":
    sys.exit(main())
