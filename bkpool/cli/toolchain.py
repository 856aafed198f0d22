"""`bkpool toolchain`: gets the tools that bkpool runs, ahead of time, and says where they are."""

from __future__ import annotations

import click

from bkpool.cli import console, options


@click.command(short_help="Get the tools that bkpool runs, and say where they are.")
@click.argument("names", metavar="[TOOL]...", nargs=-1)
@options.as_json
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Get the tools that bkpool runs, where this machine lacks them, and say where they are.

    With the names of tools only their paths are printed, one a line, also when stdout is no terminal.
    """
    from bkpool.cli import tools  # noqa: PLC0415 - the toolchain takes its time to import
    from bkpool.core.errors import InvalidInput  # noqa: PLC0415
    from bkpool.toolchain import Tool  # noqa: PLC0415

    unknown = [name for name in names if name not in set(Tool)]
    if unknown:
        raise InvalidInput(
            f"TOOL: there is no tool {unknown[0]!r}", hint=f"There are {', '.join(Tool)}.", field="TOOL"
        )
    wanted = [Tool(name) for name in names] or [tool for tool in Tool if tool is not Tool.KIND]
    paths = {str(tool): str(path) for tool, path in tools.ensure(wanted).items()}
    if names and not as_json:
        click.echo("\n".join(paths.values()))
        return
    console.answer(
        paths, as_json=as_json, show=lambda: "\n".join(f"{tool:12} {path}" for tool, path in paths.items())
    )
