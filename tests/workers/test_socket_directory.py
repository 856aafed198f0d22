from __future__ import annotations

from pathlib import Path

from bkpool.core.names import Slot
from bkpool.workers.processes.socket_directory import slot_directory


def test_slots_with_alike_names_have_different_places():
    slots = [Slot("a", "p" * 30, 1), Slot("a", "p" * 31, 1), Slot("b", "p" * 30, 1), Slot("a", "p" * 30, 2)]
    assert len({slot_directory(Path("/run/x"), slot) for slot in slots}) == len(slots)
