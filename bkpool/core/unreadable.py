"""An object of the store that this version cannot read: what can still be said of it.

A newer version may have written it, or a person has broken a field. Nothing is guessed or repaired here: only its
name is trusted, and single values that the rest of the document does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.core.names import Key, Slot, slot_of
from bkpool.core.resource import Condition, Metadata, R, Resource, condition

CONDITION = "Unreadable"
"""The type of the condition, and the reason of the Event, that name such objects."""
_NAMED = 5  # objects in one message: thousands may be unreadable after a downgrade
_HINT = "Correct that field, or delete the object. If a newer bkpool wrote it, use that version."


@dataclass(frozen=True, slots=True)
class Unreadable:
    """One object that exists and cannot be read. Nobody changes it, and what runs for it is left alone."""

    kind: type[Resource]
    key: Key
    reason: str
    """Which field cannot be read and why, without a stop at the end."""
    document: Mapping[str, Any] = field(repr=False)
    """The object as it is stored."""

    @property
    def uid(self) -> str:
        """The uid that the store assigned; empty if it has none."""
        return _text(_mapping(self.document, "metadata"), "uid")

    @property
    def version(self) -> str:
        """Its resourceVersion; "0" if it has none."""
        found = _text(_mapping(self.document, "metadata"), "resourceVersion")
        return found if found.isdecimal() else "0"

    @property
    def slot(self) -> Slot | None:
        """The slot that a worker of this name takes up; None if this is not the name of a worker."""
        try:
            return slot_of(self.key)
        except InvalidInput:
            return None

    @property
    def pool(self) -> Key | None:
        """The pool that a worker belongs to, by its name, else by its spec; None if neither names one."""
        slot = self.slot
        name = slot.pool if slot else _text(_mapping(_mapping(self.document, "spec"), "poolRef"), "name")
        return Key(self.key.namespace, name) if name else None

    @property
    def may_be_leased(self) -> bool:
        """Whether a worker has a lease, as far as one can tell."""
        spec = self.document.get("spec")
        return not isinstance(spec, Mapping) or spec.get("allocation") is not None

    def of_lease(self, name: str) -> str:
        """A text in a worker's lease, such as `tokenSHA256`; empty if it is not there or is no text."""
        return _text(_mapping(_mapping(self.document, "spec"), "allocation"), name)

    @property
    def message(self) -> str:
        """What cannot be read, in a sentence without a stop."""
        return f"{self.kind.KIND} {self.key} cannot be read: {self.reason}"

    @property
    def status(self) -> Mapping[str, Any]:
        """Its status as it is stored; empty if there is none."""
        return _mapping(self.document, "status")

    def stand_in(self, kind: type[R]) -> R:
        """An object with only its name, its uid and its version, for what needs no more of it."""
        namespace, name = self.key
        metadata = Metadata.model_construct(
            name=name, namespace=namespace, uid=self.uid, resource_version=self.version
        )
        return cast("R", kind.model_construct(metadata=metadata))

    def condition(self, now: datetime) -> Condition:
        """The condition that says that it cannot be read."""
        return condition((), CONDITION, "True", reason="CannotBeRead", message=self.message, now=now)

    def noted(self, now: datetime) -> dict[str, Any] | None:
        """The fields of its status that say that it cannot be read; None if they say so already."""
        conditions = self.status.get("conditions")
        stored = [one for one in conditions if isinstance(one, Mapping)] if isinstance(conditions, list) else []
        if any((one.get("type"), one.get("message")) == (CONDITION, self.message) for one in stored):
            return None
        others = [one for one in stored if one.get("type") != CONDITION]
        note = self.condition(now).model_dump(mode="json", by_alias=True, exclude_none=True)
        return {"conditions": [*others, note]}


class UnreadableObject(HostFault):
    """An object exists and cannot be read. It is left alone, and so is everything that belongs to it.

    Args:
        found: The object.
    """

    def __init__(self, found: Unreadable) -> None:
        super().__init__(found.message, hint=_HINT, code="Unreadable")
        self.found = found


def named(found: Sequence[Unreadable]) -> str:
    """Which objects cannot be read, and what to do, for a condition; empty if there are none."""
    if not found:
        return ""
    ordered = sorted(found, key=lambda one: one.key)
    more = f"; and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return f"{'; '.join(one.message for one in ordered[:_NAMED])}{more}. {_HINT}"


def noted_by(conditions: Sequence[Condition]) -> str:
    """What the condition of this module says among these; empty if it is not there."""
    return next((one.message for one in conditions if one.type == CONDITION), "")


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, Mapping) else {}


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else ""
