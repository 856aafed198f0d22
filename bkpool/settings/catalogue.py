"""Each setting of the model as an object: its names, what it allows, and how a written value is checked.

Pure: a value comes in as an argument and goes out as a result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bkpool.core.errors import InvalidInput
from bkpool.settings.kinds import Toml, ValueKind
from bkpool.settings.model import Settings

PREFIX = "BKPOOL_"
NOT_IN_A_FILE = {
    "home": "Set the environment variable BKPOOL_HOME.",
    "backend": "Give `up` the option --backend, as in `bkpool up --backend kind`.",
}
"""What is not a setting although it looks like one, and how it is given."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        section: The section of the file.
        field: The name in the section.
    """

    section: str
    field: str

    @property
    def name(self) -> str:
        """As `bkpool config` names it: gateway.handshake_timeout."""
        return f"{self.section}.{self.field}"

    @property
    def variable(self) -> str:
        """The environment variable: BKPOOL_GATEWAY_HANDSHAKE_TIMEOUT."""
        return f"{PREFIX}{self.section}_{self.field}".upper()

    @property
    def parameter(self) -> str:
        """The name of the option's value in a command: gateway_handshake_timeout."""
        return f"{self.section}_{self.field}"

    @cached_property
    def kind(self) -> ValueKind:
        """The kind of its values."""
        return next(item for item in self._info.metadata if isinstance(item, ValueKind))

    @property
    def option(self) -> str:
        """The option of `up`; empty where there is none."""
        return str(self._more["option"])

    @property
    def metavar(self) -> str:
        """What stands for a value in `--help`."""
        return str(self._more["metavar"]) or self.kind.metavar

    @property
    def remembered(self) -> bool:
        """Whether `up` remembers it, where it was given as an option."""
        return bool(self._more["remembered"])

    @property
    def description(self) -> str:
        """What it is for."""
        return self._info.description or ""

    @property
    def default(self) -> Any:
        """Its value where nobody gives one."""
        return self._info.default

    @property
    def default_text(self) -> str:
        """The same in words."""
        unset = str(self._more["unset"])
        return unset if unset and self.default in (None, ()) else self.text(self.default)

    @property
    def allowed(self) -> str:
        """What may be written, in words: a duration from 1s to 2m, such as 10s."""
        lowest, highest = self._bounds
        unit = f" of {self._more['unit']}" if self._more["unit"] else ""
        if lowest is not None and highest is not None:
            return f"{self.kind.name}{unit} from {self.text(lowest)} to {self.text(highest)}"
        return f"{self.kind.name}{unit}"

    def text(self, value: Any) -> str:
        """A value as an option or a variable has it; empty for None."""
        if value is None:
            return ""
        written = self.kind.write(value)
        if isinstance(written, bool):
            return "true" if written else "false"
        return ",".join(written) if isinstance(written, list) else str(written)

    def from_text(self, text: str, *, where: str, directory: Path) -> Any:
        """The value that an option or a variable gives.

        Args:
            text: What was written.
            where: The option or the variable, for the error.
            directory: Where relative paths start.

        Raises:
            InvalidInput: The text is not allowed.
        """
        try:
            written = self.kind.from_text(text)
        except ValueError as error:
            raise self._refused(text, where, str(error)) from None
        return self.from_toml(written, where=where, directory=directory, shown=text)

    def from_toml(self, written: Toml, *, where: str, directory: Path, shown: object = None) -> Any:
        """The value that a file gives. Arguments and errors as `from_text`."""
        shown = written if shown is None else shown
        try:
            value = self.kind.read(written, directory)
        except ValueError as error:
            raise self._refused(shown, where, str(error)) from None
        try:
            return getattr(self._section(**{self.field: value}), self.field)
        except ValidationError:
            raise self._refused(shown, where, self._why_out_of_bounds(value)) from None

    def _refused(self, written: object, where: str, reason: str) -> InvalidInput:
        example = "" if " from " in self.allowed else f", such as {self.kind.example}"
        if isinstance(written, list):
            shown = json.dumps(written, ensure_ascii=False, default=str)[:80]
        else:
            shown = repr(str(written)[:80])
        return InvalidInput(f"{where}: {shown} {reason}", hint=f"Write {self.allowed}{example}.", field=where)

    def _why_out_of_bounds(self, value: Any) -> str:
        lowest, _ = self._bounds
        because = self._more["lowest_because"]
        return f"is too low: {because}" if because and value < lowest else "is out of bounds"

    @property
    def _bounds(self) -> tuple[Any, Any]:
        """The lowest and the highest value that are allowed; None where there is no such bound."""
        lowest = next((item.ge for item in self._info.metadata if isinstance(item, Ge)), None)
        highest = next((item.le for item in self._info.metadata if isinstance(item, Le)), None)
        return lowest, highest

    @property
    def _section(self) -> type[BaseModel]:
        return section_models()[self.section]

    @property
    def _info(self) -> FieldInfo:
        return self._section.model_fields[self.field]

    @property
    def _more(self) -> dict[str, Any]:
        more = self._info.json_schema_extra
        return more if isinstance(more, dict) else {}


@lru_cache
def section_models() -> dict[str, type[BaseModel]]:
    """The sections in the order of the model."""
    return {name: type(info.default) for name, info in Settings.model_fields.items()}


@lru_cache
def all_settings() -> dict[str, Setting]:
    """All settings by their name, in the order of the model."""
    found = [Setting(section, field) for section, model in section_models().items() for field in model.model_fields]
    return {one.name: one for one in found}


def find(name: str) -> Setting:
    """The setting with this name.

    Args:
        name: As gateway.handshake_timeout, or as its environment variable or its option.

    Raises:
        InvalidInput: There is none; the hint has the nearest name.
    """
    for one in all_settings().values():
        if name in {one.name, one.variable, one.option or one.name}:
            return one
    hint = NOT_IN_A_FILE.get(name.removeprefix("--")) or nearest(name, all_settings())
    raise InvalidInput(f"there is no setting {name[:80]!r}", hint=hint, field=name)


def nearest(name: str, known: Any) -> str:
    """A hint with the nearest known name, or with where all are listed."""
    close = get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]}?" if close else "`bkpool config` lists all settings."
