"""Why parts of a copy of the store may be out of date, and which of that is a reason to refuse all callers.

It reads no clock of its own, and knows nothing of lists and watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import BkpoolError, Forbidden
from bkpool.core.resource import Resource

Followed = tuple[type[Resource], str | None]
"""A kind in a scope."""

ISSUERS_HOLD = 60.0
"""Seconds for which issuers may be out of date: they hardly ever change, and no pool needs them."""
_UNLISTED = "the store has not been read yet"


class Troubles:
    """Why parts of the copy may be out of date.

    Args:
        followed: All parts.
        seconds: Monotonic time.
    """

    def __init__(self, followed: Iterable[Followed], seconds: Callable[[], float]) -> None:
        self.unlisted = set(followed)
        """What was never listed."""
        self._all = frozenset(self.unlisted)
        self._seconds = seconds
        self._found: dict[Followed, BkpoolError] = {}
        self._since: dict[Followed, float] = {}

    @property
    def worst(self) -> str | None:
        """A reason why everything may be out of date. A right that is missing in some namespaces is none."""
        wide = (error.message for followed, error in self._found.items() if self._is_wide(followed, error))
        return next(wide, _UNLISTED if self.unlisted else None)

    def listed(self, followed: Followed) -> bool:
        """Notes that this is up to date. Returns whether it was not."""
        self.unlisted.discard(followed)
        self._since.pop(followed, None)
        return self._found.pop(followed, None) is not None

    def note(self, followed: Followed, error: BkpoolError) -> None:
        """Notes why this may be out of date."""
        self._found[followed] = error
        self._since.setdefault(followed, self._seconds())

    def _is_wide(self, followed: Followed, error: BkpoolError) -> bool:
        kind, _ = followed
        lasts = self._seconds() - self._since[followed]
        if kind is OIDCConfig and followed not in self.unlisted and lasts < ISSUERS_HOLD:
            return False
        return not isinstance(error, Forbidden) or all(
            isinstance(self._found.get(other), Forbidden) for other in self._all if other[0] is kind
        )
