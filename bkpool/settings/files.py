"""The two files of settings in BKPOOL_HOME: `config.toml` of the operator, and `remembered.toml` of `up`.

bkpool writes the operator's file only for `bkpool config set` and `unset`, and then changes one line of it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.home.files import as_host_fault, permission_hint, private_directory, write_private
from bkpool.settings.catalogue import Setting
from bkpool.settings.kinds import Toml
from bkpool.settings.sources import (
    Layer,
    ResolvedSettings,
    SettingValue,
    ValueSource,
    from_document,
    from_environment,
    from_options,
    resolve,
)

CONFIG_FILE = "config.toml"
REMEMBERED_FILE = "remembered.toml"
_LARGEST = 1 << 20  # bytes; a file with every setting and a page of comments on each has a tenth of this
_HEADER = re.compile(r"\s*\[\s*([A-Za-z0-9_-]+)\s*\]\s*(#.*)?")


def load(
    home: Path, environment: Mapping[str, str], options: Mapping[str, Toml], directory: Path
) -> ResolvedSettings:
    """The settings of an appliance, from all sources.

    Args:
        home: BKPOOL_HOME, whether it exists or not.
        environment: The variables of this process.
        options: What the command line gives, by the name of the setting; see `from_options`.
        directory: Where relative paths in options and variables start.

    Raises:
        InvalidInput: A value is not allowed, or there is no such setting.
        HostFault: A file cannot be read.
    """
    return resolve(
        from_options(options, directory),
        from_environment(environment, directory),
        from_document(read(home / CONFIG_FILE), home / CONFIG_FILE, ValueSource.FILE),
        remembered(home),
    )


def remembered(home: Path) -> Layer:
    """What the `up`s before were given as options.

    Raises:
        InvalidInput: The file is damaged, or is from another version of bkpool.
    """
    file = home / REMEMBERED_FILE
    try:
        return from_document(read(file), file, ValueSource.REMEMBERED)
    except InvalidInput as error:
        error.hint = "Forget what was remembered with `bkpool config unset --all`, and give `up` its options again."
        raise


def remember(home: Path, values: Iterable[SettingValue]) -> None:
    """Keeps these values for the next `up`, in place of older ones of the same settings. Others stay.

    Raises:
        HostFault: The file cannot be written.
    """
    new = {one.setting.name: one for one in values if one.setting.remembered}
    before = remembered(home)
    if {name: before[name].value for name in new.keys() & before.keys()} != {n: one.value for n, one in new.items()}:
        _write_remembered(home, before | new)


def forget(home: Path, setting: Setting | None) -> bool:
    """Forgets what `up` remembers of one setting, or all of it. Returns whether there was anything.

    Raises:
        HostFault: The file cannot be changed or removed.
    """
    file = home / REMEMBERED_FILE
    if setting is None:
        there = file.exists()
        with as_host_fault(file):
            file.unlink(missing_ok=True)
        return there
    before = remembered(home)
    if setting.name not in before:
        return False
    del before[setting.name]
    _write_remembered(home, before)
    return True


def _write_remembered(home: Path, layer: Layer) -> None:
    private_directory(home)
    lines = ["# Written by `bkpool up`. `bkpool config unset NAME` removes a line, `bkpool config unset --all` all."]
    section = ""
    for one in sorted(layer.values(), key=lambda value: value.setting.name):
        if one.setting.section != section:
            section = one.setting.section
            lines += ["", f"[{section}]"]
        lines.append(_line(one.setting, one.setting.kind.write(one.value)))
    write_private(home / REMEMBERED_FILE, "\n".join([*lines, ""]).encode())


def change(home: Path, setting: Setting, value: Any) -> bool:
    """Writes one setting into config.toml, or with None removes it. All other lines stay as they are.

    If the file is a symbolic link, its target is written.

    Returns:
        Whether the file changed.

    Raises:
        InvalidInput: The file is not valid TOML, or writes this setting in a form that takes more than one line; or
            the change would make the file one that `up` refuses.
        HostFault: The file cannot be read or written.
    """
    file = home / CONFIG_FILE
    before, text = read(file), _text(file)
    written = None if value is None else setting.kind.write(value)
    after = _changed(text, setting, written)
    if after == text:
        return False
    wanted = {name: dict(fields) for name, fields in before.items()}
    if written is None:
        wanted.get(setting.section, {}).pop(setting.field, None)
    else:
        wanted.setdefault(setting.section, {})[setting.field] = written
    try:
        valid = tomllib.loads(after) == wanted
    except tomllib.TOMLDecodeError:
        valid = False
    if not valid:
        raise InvalidInput(
            f"{file}: [{setting.section}] {setting.field}: bkpool cannot change this line without changing others",
            hint="Edit the file yourself.",
            field=setting.name,
        )
    _check_change(before, wanted, file, setting)
    private_directory(home)
    write_private(file.resolve(), after.encode())  # a link stays: its target is the file of the operator
    return True


def _check_change(before: Mapping[str, Any], after: Mapping[str, Any], file: Path, setting: Setting) -> None:
    """Refuses a change after which the values of the file contradict each other.

    A file that is wrong already may be changed, or a user could not correct it one setting at a time.
    """
    wrong = _fault_in(after, file)
    if wrong is not None and _fault_in(before, file) is None:
        reason = wrong.message.removeprefix(f"{wrong.field}: ")
        raise InvalidInput(f"{setting.name}: {reason}", hint=wrong.hint, field=setting.name)


def fault(home: Path) -> InvalidInput | None:
    """Why `up` would refuse config.toml by itself; None where it would not. Raises as `read`."""
    return _fault_in(read(home / CONFIG_FILE), home / CONFIG_FILE)


def _fault_in(document: Mapping[str, Any], file: Path) -> InvalidInput | None:
    try:
        resolve(from_document(document, file, ValueSource.FILE))
    except InvalidInput as error:
        return error
    return None


def read(file: Path) -> dict[str, Any]:
    """The content of a TOML file; nothing where there is no file.

    Raises:
        InvalidInput: It is not TOML; the message has the line.
        HostFault: It cannot be read.
    """
    try:
        return tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{file}: {error}", hint="Correct this line (https://toml.io).", field=str(file)) from None
    except RecursionError:
        raise InvalidInput(
            f"{file}: is nested too deeply", hint="Write sections with one value in a line.", field=str(file)
        ) from None


def _text(file: Path) -> str:
    try:
        with file.open("rb") as source:
            content = source.read(_LARGEST + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        hint = permission_hint(file) or "Make it readable."
        raise HostFault(f"{file} cannot be read: {error.strerror}", hint=hint, code="Unreadable") from None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"{file}: is not text in UTF-8", hint="Save it as UTF-8.", field=str(file)) from None
    if len(content) > _LARGEST:
        raise InvalidInput(f"{file}: is larger than {_LARGEST} bytes", hint="Remove what is not settings.")
    return text


def _changed(text: str, setting: Setting, written: Toml | None) -> str:
    """The text of the file with one line set or removed. The caller checks the result."""
    lines = text.splitlines()
    header, found, section = None, None, ""
    field = re.compile(rf"\s*{re.escape(setting.field)}\s*=")
    for number, line in enumerate(lines):
        if match := _HEADER.fullmatch(line):
            section = match[1]
            header = number if section == setting.section else header
        elif section == setting.section and field.match(line):
            found = number
    if written is None:
        if found is not None:
            del lines[found]
    elif found is not None:
        lines[found] = _line(setting, written)
    elif header is not None:
        lines.insert(header + 1, _line(setting, written))
    else:
        lines += [*([""] if lines else []), f"[{setting.section}]", _line(setting, written)]
    return "".join(f"{line}\n" for line in lines)


def _line(setting: Setting, written: Toml) -> str:
    # A JSON text, number, truth value or list of texts is TOML, too: a value has no unprintable characters.
    return f"{setting.field} = {json.dumps(written, ensure_ascii=False)}"
