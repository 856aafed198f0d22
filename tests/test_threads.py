"""Which work shares the threads of the event loop with the look-up of names: only such as ends at once."""

from __future__ import annotations

import re
from pathlib import Path

ROOM = Path(__file__).parent.parent / "bkpool"
IN_THE_LOOPS_THREADS = {
    "identity/static_tokens.py",  # to parse a Secret that was read already
    "store/sqlite.py",  # to open the database, before anything else runs
    "store/thread.py",  # the end of the store's own threads
}


def test_nothing_that_may_take_long_runs_in_the_threads_that_look_up_names():
    """Anything else gets a group of its own: `bkpool.home.threads`."""
    users = {
        str(path.relative_to(ROOM))
        for path in ROOM.rglob("*.py")
        if re.search(r"\bto_thread\b|\brun_in_executor\b|ThreadPoolExecutor", path.read_text())
    }
    assert users == IN_THE_LOOPS_THREADS
