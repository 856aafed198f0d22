"""Callbacks are called in order, and never after they have been unsubscribed."""

from __future__ import annotations

from bkpool.core.subscribers import Subscribers


def test_callbacks_are_called_in_order_with_the_arguments():
    called: list[tuple[str, int]] = []
    subscribers: Subscribers[[int]] = Subscribers()
    subscribers.add(lambda number: called.append(("first", number)))
    subscribers.add(lambda number: called.append(("second", number)))
    subscribers.notify(7)
    assert called == [("first", 7), ("second", 7)]


def test_each_subscription_ends_alone_and_only_once():
    called: list[int] = []
    subscribers: Subscribers[[int]] = Subscribers()
    first, second = subscribers.add(called.append), subscribers.add(called.append)
    first()
    first()
    subscribers.notify(1)
    assert (called, len(subscribers)) == ([1], 1)
    second()
    subscribers.notify(2)
    assert (called, len(subscribers)) == ([1], 0)


def test_a_callback_may_end_subscriptions_and_add_others():
    called: list[str] = []
    subscribers: Subscribers[[]] = Subscribers()

    def first() -> None:
        called.append("first")
        end_second()
        end_first()
        subscribers.add(lambda: called.append("added"))

    end_first = subscribers.add(first)
    end_second = subscribers.add(lambda: called.append("second"))
    subscribers.add(lambda: called.append("third"))
    subscribers.notify()
    assert called == ["first", "third"], "the second was unsubscribed before its turn; the new one waits for a change"
    subscribers.notify()
    assert called == ["first", "third", "third", "added"]
