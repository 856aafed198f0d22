"""Times in the format of the Kubernetes API. Pure string work."""

from __future__ import annotations

from datetime import UTC, datetime


def micro(at: datetime) -> str:
    """A MicroTime: UTC with microseconds, as Lease and Event objects have it."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
