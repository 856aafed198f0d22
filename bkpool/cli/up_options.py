"""The options of `up` that give a setting, made from the model of settings, and the values that result.

`bkpool config` takes the same options, to show what `up` would use with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from bkpool.cli import home
from bkpool.core.errors import InvalidInput
from bkpool.settings import files, kinds
from bkpool.settings.catalogue import Setting, all_settings
from bkpool.settings.sources import ResolvedSettings, SettingValue, ValueSource

F = TypeVar("F", bound=Callable[..., Any])


def setting_options(command: F) -> F:
    """Gives a command every option that gives a setting."""
    with_option = [one for one in all_settings().values() if one.option]
    return reduce(lambda made, one: _option(one)(made), reversed(with_option), command)


def _option(one: Setting) -> Callable[[F], F]:
    if one.kind is kinds.SWITCH:
        name = one.option.removeprefix("--")
        return click.option(f"--{name}/--no-{name}", one.parameter, default=None, help=one.description)
    help_text = one.description
    if default := one.default_text:
        help_text += f"  [default: {default}]"
    if one.kind.repeated:
        help_text += "  Repeatable."
        return click.option(one.option, one.parameter, multiple=True, metavar=one.metavar, help=help_text)
    return click.option(one.option, one.parameter, metavar=one.metavar, help=help_text)


def load(parameters: Mapping[str, Any]) -> ResolvedSettings:
    """The settings of this home, with the options that a command was given.

    Args:
        parameters: What click read for the options of `setting_options`.

    Raises:
        InvalidInput: A value is not allowed, a setting does not exist, or a file that is named cannot be read.
        HostFault: A file of settings cannot be read.
    """
    given = {
        one.name: list(value) if isinstance(value, tuple) else value
        for one in all_settings().values()
        if (value := parameters.get(one.parameter)) not in {None, ()}
    }
    resolved = files.load(home.home(), os.environ, given, Path.cwd())
    for value in resolved.values:
        check_files(value)
    return resolved


def check_files(value: SettingValue) -> None:
    """Checks that the files that a setting names can be read.

    Raises:
        InvalidInput: One cannot be read; the message names where it was given.
    """
    for path in _files(value):
        readable(path, value.where, _hint(value))


def arguments(values: Iterable[SettingValue]) -> list[str]:
    """The command line that gives these values. Paths in it are absolute."""
    parts: list[str] = []
    for one in values:
        written = one.setting.kind.write(one.value)
        if isinstance(written, bool):
            parts.append(one.setting.option if written else one.setting.option.replace("--", "--no-", 1))
        elif one.setting.kind.repeated and isinstance(written, list):
            parts += [part for item in written for part in (one.setting.option, item)]
        else:
            parts += [one.setting.option, one.text]
    return parts


def absolute_variables(resolved: ResolvedSettings) -> dict[str, str]:
    """The environment variables that name files, with absolute paths: for a process in another directory."""
    return {one.setting.variable: one.text for one in resolved.of(ValueSource.ENVIRONMENT) if _files(one)}


def readable(path: Path, where: str, hint: str = "Correct the name.") -> Path:
    """The path, made absolute.

    Raises:
        InvalidInput: The file cannot be read; the message names where it was given.
    """
    try:
        with path.open("rb"):
            return path.absolute()
    except OSError as error:
        raise InvalidInput(f"{where}: {path} cannot be read: {error.strerror}", hint=hint, field=where) from None


def _files(value: SettingValue) -> tuple[Path, ...]:
    if value.setting.kind is kinds.FILE and value.value is not None:
        return (value.value,)
    return value.value if value.setting.kind is kinds.FILES else ()


def _hint(value: SettingValue) -> str:
    if value.source is ValueSource.REMEMBERED:
        return f"Give {value.setting.option} again, or forget it: `bkpool config unset {value.setting.name}`."
    return "Correct the name."
