"""A store for copies in memory that nothing but the test fills."""

from __future__ import annotations

from typing import Any


class NoStore:
    """Has no objects and cannot be asked for any."""

    def scopes(self, _kind: type[Any]) -> tuple[str | None, ...]:
        return (None,)
