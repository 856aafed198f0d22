"""How a section of the settings is written: its base class, and the fields that it has.

It knows no setting.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Section(BaseModel):
    """A section of the file. Its docstring is the text of the documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def setting(
    default: Any,
    description: str,
    *,
    between: tuple[Any, Any] | None = None,
    lowest_because: str = "",
    unit: str = "",
    option: str = "",
    metavar: str = "",
    unset: str = "",
    remembered: bool = True,
) -> Any:
    """A field of a section.

    Args:
        default: Its value where nobody gives one.
        description: What it is for, in plain words.
        between: The lowest and the highest value that are allowed.
        lowest_because: Why a lower value is not allowed; an error about one says it.
        unit: What a number counts.
        option: The option of `up` that gives it; empty where there is none.
        metavar: The placeholder of the value in `--help`, where the default of its type is not clear enough.
        unset: What happens where it has no value.
        remembered: Whether `up` remembers it for the next `up`, where it was given as an option.
    """
    lowest, highest = between or (None, None)
    more: dict[str, JsonValue] = {
        "lowest_because": lowest_because,
        "unit": unit,
        "option": option,
        "metavar": metavar,
        "unset": unset,
        "remembered": remembered,
    }
    return Field(default, description=description, ge=lowest, le=highest, json_schema_extra=more)


def seconds(number: float) -> timedelta:
    """A duration."""
    return timedelta(seconds=number)
