"""Which backend an `up` gets: pure, so that the rule is in one place and can be read off its tests.

Nothing is asked of this machine here but through the function that is handed in, and that only where it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bkpool.core.errors import HostFault

AUTO, PROCESS, KIND, KUBERNETES = "auto", "process", "kind", "kubernetes"


def choose_backend(
    asked: str, recorded: str | None, engine_fault: Callable[[], str | None], home: Path
) -> tuple[str, str]:
    """The backend of a home: the first `up` decides, and later ones never silently change worlds.

    Args:
        asked: What the command line says; `auto` leaves it to us.
        recorded: What this home was made with; None for a new one.
        engine_fault: Says why no container engine can be used, or None; called only where that decides.
        home: The home, for the message.

    Returns:
        The backend, and why it is that one, for one line to the user.

    Raises:
        HostFault: `OtherBackend`: this home was made with another one.
    """
    if recorded is None:
        return (asked, "as asked") if asked != AUTO else _first(engine_fault())
    if asked not in {AUTO, recorded}:
        raise HostFault(
            f"--backend: {home} holds a world of backend {recorded!r}, not {asked!r}",
            hint=f"Use --backend {recorded}, another BKPOOL_HOME, or `bkpool down --purge` to begin anew.",
            code="OtherBackend",
        )
    return recorded, "as asked" if asked == recorded else "what this home was made with"


def _first(engine_fault: str | None) -> tuple[str, str]:
    if engine_fault is None:
        return KIND, "a container engine answers"
    return PROCESS, f"it needs no container engine, and {engine_fault}"
