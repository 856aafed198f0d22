"""Who is closed when there are too many connections: a table, and a model that holds for every order of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bkpool.core.connection_places import ConnectionPlaces, origin_of


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ffff", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("not an address", "not an address"),
    ],
)
def test_an_origin_is_an_address_or_a_network_of_ipv6(host, origin):
    assert origin_of(host) == origin


def test_the_oldest_without_a_request_is_closed_first():
    places: ConnectionPlaces[str] = ConnectionPlaces(3, 3)
    assert [places.enter(one, "a") for one in "xyz"] == [None] * 3
    places.asks("x")
    assert places.enter("4", "b") == "y"
    places.asks_nothing("x")
    assert places.enter("5", "b") == "z"
    assert places.enter("6", "b") == "4", "x has got its answer, and is younger than 4"
    assert list(places) == ["x", "5", "6"]


def test_one_origin_takes_nothing_from_another_once_it_has_its_own_places():
    places: ConnectionPlaces[int] = ConnectionPlaces(10, 4)
    assert places.enter(-1, "b") is None
    closed = [places.enter(number, "a") for number in range(100)]
    assert closed == [None] * 4 + list(range(96))
    assert -1 in places


def test_the_address_that_has_most_loses_one_and_a_slow_client_stays():
    """Two networks flood, each below its own limit. A client far away needs some time to ask for something."""
    places: ConnectionPlaces[object] = ConnectionPlaces(20, 15)
    for number in range(10):
        places.enter(("small", number), "192.0.2.1")
    for number in range(5):
        places.enter(("early", number), "192.0.2.2")
    assert places.enter("slow", "198.51.100.7") is None
    closed = [places.enter((origin, number), origin) for number in range(100) for origin in ("a", "b")]
    assert "slow" in places
    assert ("early", 4) in places, "and so does the last of an address that has few"
    assert closed.count(None) == 4
    places.asks("slow")
    assert "slow" in places


def test_a_flood_from_many_addresses_closes_the_oldest_of_them():
    places: ConnectionPlaces[int] = ConnectionPlaces(10, 5)
    closed = [places.enter(number, f"192.0.2.{number}") for number in range(30)]
    assert closed == [None] * 10 + list(range(20))


def test_a_new_connection_is_closed_itself_if_all_others_have_a_request():
    places: ConnectionPlaces[int] = ConnectionPlaces(2, 2)
    for number in range(2):
        places.enter(number, "a")
        places.asks(number)
    assert places.enter(2, "b") == 2
    assert len(places) == 2


class AnyOrder(RuleBasedStateMachine):
    """Compares the places with a list that is searched."""

    def __init__(self) -> None:
        super().__init__()
        self.places: ConnectionPlaces[int] = ConnectionPlaces(5, 3)
        self.waiting: list[tuple[int, str]] = []
        self.asking: dict[int, str] = {}
        self.next = 0

    def of(self, origin: str) -> int:
        return [one for _, one in self.waiting].count(origin) + list(self.asking.values()).count(origin)

    @rule(origin=st.sampled_from("abc"))
    def enter(self, origin: str) -> None:
        number, self.next = self.next, self.next + 1
        self.waiting.append((number, origin))
        waiting = Counter(of for _, of in self.waiting)
        closed = self.places.enter(number, origin)
        if self.of(origin) > 3:
            candidates = {origin}
        elif len(self.waiting) + len(self.asking) > 5:
            candidates = {of for of, count in waiting.items() if count == max(waiting.values())}
        else:
            assert closed is None
            return
        [of] = [of for one, of in self.waiting if one == closed]
        assert of in candidates
        assert closed == next(one for one, whose in self.waiting if whose == of), "the oldest of its origin"
        self.waiting = [one for one in self.waiting if one[0] != closed]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def asks(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(one)
        self.asking[one[0]] = one[1]
        self.places.asks(one[0])

    @precondition(lambda self: self.asking)
    @rule(data=st.data())
    def is_answered(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.asking)))
        self.waiting.append((number, self.asking.pop(number)))
        self.places.asks_nothing(number)

    @rule(number=st.integers(0, 30))
    def leave(self, number: int) -> None:
        self.asking.pop(number, None)
        self.waiting = [one for one in self.waiting if one[0] != number]
        self.places.leave(number)
        self.places.asks(number)
        self.places.asks_nothing(number)

    @invariant()
    def same_connections(self) -> None:
        assert set(self.places) == {number for number, _ in self.waiting} | set(self.asking)
        assert len(self.places) == len(self.waiting) + len(self.asking)


TestAnyOrder = AnyOrder.TestCase
