"""The rule that chooses the backend of an `up`. It is a pure function, so its tests show the whole rule.

The only fact about this machine comes from a function that the caller passes in, which is called only if it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bkpool.core.errors import HostFault

AUTO, PROCESS, KIND, KUBERNETES = "auto", "process", "kind", "kubernetes"


def choose_backend(
    asked: str, recorded: str | None, engine_fault: Callable[[], str | None], home: Path
) -> tuple[str, str]:
    """The backend of a home. The first `up` chooses it; a later one never changes it silently.

    Args:
        asked: What the user asked for; `auto` leaves the choice to bkpool.
        recorded: The backend that this home was created with; None for a new one.
        engine_fault: Returns why no container engine can be used, or None. Called only if that matters.
        home: The home, for the message.

    Returns:
        The backend, and the reason for it as text for the user.

    Raises:
        HostFault: `OtherBackend`: this home was created with another one. `Unreadable`: the record of it is damaged.
    """
    if recorded is None:
        return (asked, "as asked") if asked != AUTO else _first(engine_fault())
    if recorded not in {PROCESS, KIND, KUBERNETES}:
        raise HostFault(
            f"{home / 'backend'}: {recorded[:80]!r} is not a backend",
            hint=f"Write into this file what the home was created with: {PROCESS}, {KIND} or {KUBERNETES}.",
            code="Unreadable",
        )
    if asked not in {AUTO, recorded}:
        raise HostFault(
            f"--backend: {home} was created with the backend {recorded!r}, not {asked!r}",
            hint=f"Use --backend {recorded} or another BKPOOL_HOME, or start again after `bkpool down --purge`.",
            code="OtherBackend",
        )
    return recorded, "as asked" if asked == recorded else "this home was created with it"


def _first(engine_fault: str | None) -> tuple[str, str]:
    if engine_fault is None:
        return KIND, "a container engine answers"
    return PROCESS, f"it needs no container engine, and {engine_fault}"
