"""`bkpool config`: shows the settings of this home with their sources, and changes them.

It never changes a running appliance: a change takes effect at the next `up`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bkpool.cli import console, home, options, up_options
from bkpool.core.errors import InvalidInput
from bkpool.settings import files
from bkpool.settings.catalogue import find
from bkpool.settings.sources import ResolvedSettings, SettingValue, ValueSource

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.group(short_help="Show the settings of `up` and where each comes from.", invoke_without_command=True)
@click.option("--markdown", is_flag=True, help="Print the documentation of all settings, and nothing else.")
@options.as_json
@up_options.setting_options
@click.pass_context
def command(ctx: click.Context, /, *, markdown: bool, as_json: bool, **given: Any) -> None:
    """Show the settings of `up` and where each value comes from.

    The first source that has a value wins: option (flag), environment variable, config.toml in BKPOOL_HOME,
    remembered from the options of an earlier `up`, default. With options of `up`, this shows what `up` would use.
    """
    if ctx.invoked_subcommand is not None:
        return
    if markdown:
        from bkpool.settings.reference import markdown as page  # noqa: PLC0415 - only here

        click.echo(page(), nl=False)
        return
    resolved = up_options.load(given)
    described = {
        "home": str(home.home()),
        "file": str(home.home() / files.CONFIG_FILE),
        "settings": [_described(one) for one in resolved.values],
    }
    console.answer(described, as_json=as_json, show=lambda: _table(resolved))


@command.command("set", short_help="Write a setting into config.toml.")
@click.argument("name")
@click.argument("value")
@options.as_json
def set_value(*, name: str, value: str, as_json: bool) -> None:
    """Write a setting into config.toml.

    As in: bkpool config set gateway.handshake_timeout 15s

    The items of a list have commas between them and no brackets around them. The other lines of the file stay as they
    are. A value that contradicts another one of the file is refused.
    """
    setting = find(name)
    checked = setting.from_text(value, where=setting.name, directory=Path.cwd())
    up_options.check_files(SettingValue(setting, checked, ValueSource.FILE, setting.name))
    changed = files.change(home.home(), setting, checked)
    file = home.home() / files.CONFIG_FILE
    described = {"name": setting.name, "value": setting.kind.write(checked), "file": str(file), "changed": changed}
    console.answer(described, as_json=as_json, show=lambda: f"{setting.name} is {setting.text(checked)} in {file}")
    if wrong := files.fault(home.home()):
        console.note(f"warning: the file was wrong before, and still is: {wrong.message}")
    if os.environ.get(setting.variable):
        console.note(f"note: {setting.variable} is set in this environment and wins over the file.")
    _note_running(changed=changed)


@command.command(short_help="Forget a remembered setting and remove it from config.toml.")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Forget all that `up` remembers; config.toml stays as it is.")
@options.as_json
def unset(*, name: str | None, everything: bool, as_json: bool) -> None:
    """Forget what `up` remembers of a setting, and remove it from config.toml.

    NAME is the name of a setting (api.address), its option (--api-address) or its variable (BKPOOL_API_ADDRESS).
    """
    if everything == (name is not None):
        raise InvalidInput("NAME: give the name of a setting, or --all", hint="`bkpool config` lists the names.")
    if name is None:
        forgotten, removed = files.forget(home.home(), None), False
    else:
        setting = find(name)
        removed = files.change(home.home(), setting, None)  # first: it may be refused
        forgotten = files.forget(home.home(), setting)
    described = {"forgotten": forgotten, "removedFromFile": removed}
    console.answer(described, as_json=as_json, show=lambda: _unset_text(forgotten=forgotten, removed=removed))
    _note_running(changed=forgotten or removed)


def _unset_text(*, forgotten: bool, removed: bool) -> str:
    done = [text for text, applies in (("forgotten", forgotten), ("removed from config.toml", removed)) if applies]
    return " and ".join(done) or "there was nothing to forget"


def _note_running(*, changed: bool) -> None:
    if changed and home.running() is not None:
        console.note("note: the running appliance keeps its settings until `bkpool down` and `bkpool up`.")


def _described(one: SettingValue) -> dict[str, Any]:
    value = None if one.value is None else one.setting.kind.write(one.value)
    return {"name": one.setting.name, "value": value, "source": one.source.value, "where": one.where}


def _table(resolved: ResolvedSettings) -> RenderableType:
    from rich.text import Text  # noqa: PLC0415 - on a terminal only

    rows = [
        (
            Text(one.setting.name),
            Text(one.setting.default_text if one.source is ValueSource.DEFAULT else one.text),
            Text(one.source, style="dim" if one.source is ValueSource.DEFAULT else "cyan"),
        )
        for one in resolved.values
    ]
    return console.table(("setting", "value", "source"), rows, long={"value"})
