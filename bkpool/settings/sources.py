"""Where the value of each setting comes from: option, environment, file, remembered, default, in this order.

Pure: files and environment come in as they were read; errors name the place, the setting and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bkpool.core.errors import InvalidInput
from bkpool.settings.catalogue import NOT_IN_A_FILE, PREFIX, Setting, all_settings, nearest, section_models
from bkpool.settings.kinds import Toml, parse_size
from bkpool.settings.model import Settings

# Kubernetes and docker describe every Service in variables such as BKPOOL_API_PORT_8082_TCP and
# BKPOOL_API_SERVICE_HOST (Kubernetes documentation, "Discovering services"): a Service called bkpool-api must not
# stop an appliance.
_OF_A_SERVICE = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_.*)?)")


class ValueSource(StrEnum):
    """Where a value comes from; the first one that has it wins."""

    OPTION = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    REMEMBERED = "remembered"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class SettingValue:
    """The value of one setting, with its source."""

    setting: Setting
    value: Any
    source: ValueSource
    where: str
    """The option, the variable, or the place in a file; empty for a default."""

    @property
    def text(self) -> str:
        """The value as an option has it."""
        return self.setting.text(self.value)


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """The values of all settings, in the order of the model."""

    values: tuple[SettingValue, ...]

    @property
    def settings(self) -> Settings:
        """The same as the model."""
        sections: dict[str, dict[str, Any]] = {}
        for one in self.values:
            sections.setdefault(one.setting.section, {})[one.setting.field] = one.value
        return Settings.model_validate({name: section_models()[name](**fields) for name, fields in sections.items()})

    @property
    def places(self) -> dict[str, str]:
        """Name of each setting that was given to where: the option, the variable, or the place in a file."""
        return {one.setting.name: one.where for one in self.values if one.source is not ValueSource.DEFAULT}

    def of(self, *sources: ValueSource) -> tuple[SettingValue, ...]:
        """The values that come from these sources."""
        return tuple(one for one in self.values if one.source in sources)

    def get(self, name: str) -> SettingValue:
        """The value of one setting, by its name."""
        return next(one for one in self.values if one.setting.name == name)


Layer = dict[str, SettingValue]
"""What one source gives: name of the setting to value."""


def resolve(*layers: Layer) -> ResolvedSettings:
    """Puts the sources together.

    Args:
        layers: What each source gives; an earlier one wins.

    Raises:
        InvalidInput: Two values contradict each other.
    """
    found = []
    for name, one in all_settings().items():
        default = SettingValue(one, one.default, ValueSource.DEFAULT, "")
        found.append(next((layer[name] for layer in layers if name in layer), default))
    resolved = ResolvedSettings(tuple(found))
    for lower, higher in _ORDERED:
        _check_order(resolved.get(lower), resolved.get(higher))
    return resolved


_ORDERED = (
    ("controller.backoff", "controller.backoff_max"),
    ("identity.keys_fresh", "identity.keys_stale"),
    ("workers.gc_reserved_space", "workers.gc_keep_storage"),
)
"""Pairs whose first value must not exceed the second one."""


def _check_order(lower: SettingValue, higher: SettingValue) -> None:
    if _in_order(lower.value, higher.value):
        return
    given = lower if lower.source is not ValueSource.DEFAULT else higher
    raise InvalidInput(
        f"{given.where}: {lower.setting.name} ({lower.text}) is more than {higher.setting.name} ({higher.text})",
        hint=f"Lower {lower.setting.name}, or raise {higher.setting.name}.",
        field=given.where,
    )


def _in_order(lower: Any, higher: Any) -> bool:
    """Whether one value does not exceed the other. A size and a share of the disk cannot be compared."""
    if not isinstance(lower, str):
        return bool(lower <= higher)
    first, second = parse_size(lower), parse_size(higher)
    return first.is_share is not second.is_share or first.amount <= second.amount


def from_options(given: Mapping[str, Toml], directory: Path) -> Layer:
    """What the command line gives.

    Args:
        given: Name of the setting to the option's text, to a list of texts, or for a switch to whether it is on.
        directory: Where relative paths start.

    Raises:
        InvalidInput: A value is not allowed; the message names the option.
    """
    layer = {}
    for name, text in given.items():
        one = all_settings()[name]
        if isinstance(text, str):
            value = one.from_text(text, where=one.option, directory=directory)
        else:
            value = one.from_toml(text, where=one.option, directory=directory)
        layer[name] = SettingValue(one, value, ValueSource.OPTION, one.option)
    return layer


def from_environment(environment: Mapping[str, str], directory: Path) -> Layer:
    """What the environment gives; an empty variable gives nothing.

    Raises:
        InvalidInput: A value is not allowed, or a variable of a section names no setting.
    """
    by_variable = {one.variable: one for one in all_settings().values()}
    layer = {}
    for variable, text in environment.items():
        one = by_variable.get(variable)
        if one is None:
            _check_foreign(variable, by_variable)
        elif text:
            value = one.from_text(text, where=variable, directory=directory)
            layer[one.name] = SettingValue(one, value, ValueSource.ENVIRONMENT, variable)
    return layer


def _check_foreign(variable: str, known: Mapping[str, Setting]) -> None:
    ours = any(variable.startswith(f"{PREFIX}{section}_".upper()) for section in section_models())
    if ours and _OF_A_SERVICE.fullmatch(variable) is None:
        raise InvalidInput(f"{variable}: there is no such setting", hint=nearest(variable, known), field=variable)


def from_document(document: Mapping[str, Any], file: Path, source: ValueSource) -> Layer:
    """What a TOML file gives. Relative paths in it start at the file's directory.

    Raises:
        InvalidInput: There is no such section or field, or a value is not allowed; the message names the file.
    """
    layer = {}
    for section, fields in document.items():
        if section in NOT_IN_A_FILE:
            raise _misplaced(file, section, section)
        if section not in section_models():
            raise _unknown(f"{file}: [{section}]", "section", nearest(section, section_models()))
        if isinstance(fields, list):
            raise InvalidInput(
                f"{file}: {section}: is a list, and not a section", hint=f"Write [{section}].", field=str(file)
            )
        if not isinstance(fields, dict):
            raise _unknown(f"{file}: {section}", "field outside a section", f"Write a section: [{section}].")
        for field, written in fields.items():
            where = f"{file}: [{section}] {field}"
            if field in NOT_IN_A_FILE:
                raise _misplaced(file, field, f"[{section}] {field}")
            if field not in section_models()[section].model_fields:
                raise _unknown(where, "field", nearest(field, section_models()[section].model_fields))
            one = Setting(section, field)
            layer[one.name] = SettingValue(
                one, one.from_toml(written, where=where, directory=file.parent), source, where
            )
    return layer


def _misplaced(file: Path, name: str, written: str) -> InvalidInput:
    return InvalidInput(
        f"{file}: {written}: the {name} cannot be set in this file", hint=NOT_IN_A_FILE[name], field=str(file)
    )


def _unknown(where: str, what: str, hint: str) -> InvalidInput:
    return InvalidInput(f"{where}: there is no such {what}", hint=hint, field=where)
