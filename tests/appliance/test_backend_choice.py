"""Which backend an `up` chooses."""

from pathlib import Path

import pytest

from bkpool.appliance.backend_choice import choose_backend
from bkpool.core.errors import HostFault

HOME = Path("/home/somebody/.local/state/bkpool")


def never() -> str | None:
    raise AssertionError("the engine was asked although that decides nothing")


@pytest.mark.parametrize(
    ("asked", "recorded", "engine", "backend", "why"),
    [
        ("auto", None, lambda: None, "kind", "a container engine answers"),
        ("auto", None, lambda: "none answers", "process", "it needs no container engine, and none answers"),
        ("auto", "process", never, "process", "this home was created with it"),
        ("kind", None, never, "kind", "as asked"),
        ("kubernetes", "kubernetes", never, "kubernetes", "as asked"),
    ],
)
def test_the_first_up_chooses_and_later_ones_follow(asked, recorded, engine, backend, why):
    assert choose_backend(asked, recorded, engine, HOME) == (backend, why)


def test_a_home_does_not_change_its_backend():
    with pytest.raises(HostFault, match="was created with the backend 'process', not 'kind'") as raised:
        choose_backend("kind", "process", never, HOME)
    assert raised.value.code == "OtherBackend"


@pytest.mark.parametrize("asked", ["auto", "process"])
@pytest.mark.parametrize("recorded", ["docker", ""])
def test_a_record_that_names_no_backend_is_named_as_the_fault(asked, recorded):
    with pytest.raises(HostFault, match=f"^{HOME}/backend: '{recorded}' is not a backend$") as raised:
        choose_backend(asked, recorded, never, HOME)
    assert raised.value.code == "Unreadable"
    assert raised.value.hint.endswith("process, kind or kubernetes.")
