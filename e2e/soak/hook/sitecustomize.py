"""Makes an appliance in a soak count itself: on SIGUSR1 it writes its census to $BKPOOL_SOAK_CENSUS.

Python imports this module from PYTHONPATH because of its name. bkpool itself does not know it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def _count(_number: int, _frame: object) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        from soak.census import census  # noqa: PLC0415 - loaded only for a census
    finally:
        sys.path.pop(0)
    target = Path(os.environ["BKPOOL_SOAK_CENSUS"])
    draft = target.with_suffix(".new")
    draft.write_text(json.dumps(census()))
    draft.rename(target)


if "BKPOOL_SOAK_CENSUS" in os.environ:
    signal.signal(signal.SIGUSR1, _count)
