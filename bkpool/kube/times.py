"""Moments as the Kubernetes API writes them: pure string work."""

from __future__ import annotations

from datetime import UTC, datetime


def micro(at: datetime) -> str:
    """A MicroTime: UTC with six digits of a second, as Leases and Events have it."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
