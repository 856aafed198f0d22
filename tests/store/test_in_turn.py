from __future__ import annotations

from bkpool.store.in_turn import InTurn


def waiting(*items: str) -> InTurn[str]:
    made: InTurn[str] = InTurn()
    for item in items:
        made.put(item[0], item)
    return made


def test_groups_have_turns_and_each_keeps_its_order():
    assert waiting("a1", "a2", "a3", "b1", "c1", "b2").take() == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_the_next_turn_is_that_of_the_next_group():
    made = waiting("a1", "a2", "a3", "b1")
    assert made.take(1) == ["a1"]
    made.put("c", "c1")
    assert made.take(2) == ["b1", "a2"]
    assert made.take(9) == ["c1", "a3"]
    assert not made
    assert made.take() == []
