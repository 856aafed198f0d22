"""What a worker's Control API returns, as plain values: the generated messages end here.

Pure conversions. A record never has the attributes that a client gave to a build: they may hold secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

from google.protobuf.timestamp_pb2 import Timestamp

from bkpool.buildkit.stubs import control_pb2 as pb


@dataclass(frozen=True, slots=True)
class BuildkitVersion:
    """Which buildkitd answers."""

    package: str
    version: str
    """As `v0.34.2`; a build without version information says `0.0.0+unknown`."""
    revision: str

    @classmethod
    def from_message(cls, message: pb.BuildkitVersion) -> BuildkitVersion:
        """The version in an answer to Info."""
        return cls(message.package, message.version, message.revision)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One of buildkitd's own workers; a daemon of bkpool has exactly one."""

    id: str
    labels: Mapping[str, str]
    platforms: tuple[str, ...]
    """As `linux/amd64` or `linux/arm/v7`; the first is the machine's own."""

    @classmethod
    def from_message(cls, message: pb.WorkerRecord) -> WorkerRecord:
        """A record of an answer to ListWorkers."""
        parts = ((platform.OS, platform.Architecture, platform.Variant) for platform in message.platforms)
        return cls(message.ID, dict(message.Labels), tuple("/".join(filter(None, part)) for part in parts))


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One entry of the cache."""

    id: str
    record_type: str
    """As `regular`, `source.local` or `exec.cachemount`."""
    description: str
    """Quotes the build step that made the entry, so it belongs to the owner of the cache."""
    size: int
    """Bytes."""
    in_use: bool
    mutable: bool
    shared: bool
    usage_count: int
    created_at: datetime | None
    last_used_at: datetime | None
    parents: tuple[str, ...]

    @classmethod
    def from_message(cls, message: pb.UsageRecord) -> UsageRecord:
        """A record of an answer to DiskUsage or Prune."""
        return cls(
            id=message.ID,
            record_type=message.RecordType,
            description=message.Description,
            size=message.Size,
            in_use=message.InUse,
            mutable=message.Mutable,
            shared=message.Shared,
            usage_count=message.UsageCount,
            created_at=_time(message.CreatedAt) if message.HasField("CreatedAt") else None,
            last_used_at=_time(message.LastUsedAt) if message.HasField("LastUsedAt") else None,
            parents=tuple(message.Parents),
        )


class BuildEventType(IntEnum):
    """What happened to a build; the numbers are BuildKit's."""

    STARTED = pb.STARTED
    COMPLETE = pb.COMPLETE
    DELETED = pb.DELETED


@dataclass(frozen=True, slots=True)
class ContentDescriptor:
    """Where the log or the trace of a build is, in the content store of its worker."""

    media_type: str
    digest: str
    size: int
    """Bytes."""

    @classmethod
    def from_message(cls, message: pb.Descriptor) -> ContentDescriptor:
        """A descriptor of a build record."""
        return cls(message.media_type, message.digest, message.size)


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """One build. BuildKit keeps 50 of them for 48 hours, unless its configuration says otherwise."""

    ref: str
    frontend: str
    created_at: datetime | None
    completed_at: datetime | None
    """None: it still runs."""
    error_code: int
    """The gRPC status code with which it failed; 0: it did not fail."""
    error: str
    """Why it failed. It quotes the build, so it belongs to the owner of the cache."""
    total_steps: int
    cached_steps: int
    completed_steps: int
    warnings: int
    pinned: bool
    log: ContentDescriptor | None
    trace: ContentDescriptor | None

    @classmethod
    def from_message(cls, message: pb.BuildHistoryRecord) -> BuildRecord:
        """The record of an event of ListenBuildHistory."""
        return cls(
            ref=message.Ref,
            frontend=message.Frontend,
            created_at=_time(message.CreatedAt) if message.HasField("CreatedAt") else None,
            completed_at=_time(message.CompletedAt) if message.HasField("CompletedAt") else None,
            error_code=message.error.code,
            error=message.error.message,
            total_steps=message.numTotalSteps,
            cached_steps=message.numCachedSteps,
            completed_steps=message.numCompletedSteps,
            warnings=message.numWarnings,
            pinned=message.pinned,
            log=ContentDescriptor.from_message(message.logs) if message.HasField("logs") else None,
            trace=ContentDescriptor.from_message(message.trace) if message.HasField("trace") else None,
        )


@dataclass(frozen=True, slots=True)
class BuildEvent:
    """A build that started, completed or was deleted from the history."""

    type: BuildEventType
    record: BuildRecord

    @classmethod
    def from_message(cls, message: pb.BuildHistoryEvent) -> BuildEvent:
        """An event of ListenBuildHistory.

        Raises:
            ValueError: The type is not one of BuildKit 0.34.
        """
        return cls(BuildEventType(message.type), BuildRecord.from_message(message.record))


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
