"""A client for the Control API of one worker: what it is, what its cache holds, which builds it has run.

It decides nothing and keeps nothing. It never starts a build, never connects a second time, and never logs.
"""

from __future__ import annotations

from bkpool.buildkit.client import CallTimeouts, ControlClient, connect
from bkpool.buildkit.connection import WorkerTls
from bkpool.buildkit.readiness import ask_on_socket, ask_over_tls
from bkpool.buildkit.records import (
    BuildEvent,
    BuildEventType,
    BuildkitVersion,
    BuildRecord,
    ContentDescriptor,
    UsageRecord,
    WorkerRecord,
)
from bkpool.buildkit.tls_client import TlsSessions

__all__ = [
    "BuildEvent",
    "BuildEventType",
    "BuildRecord",
    "BuildkitVersion",
    "CallTimeouts",
    "ContentDescriptor",
    "ControlClient",
    "TlsSessions",
    "UsageRecord",
    "WorkerRecord",
    "WorkerTls",
    "ask_on_socket",
    "ask_over_tls",
    "connect",
]
