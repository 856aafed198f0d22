"""`bkpool toolchain`: gets the tools that bkpool runs, before they are needed, and shows their paths."""

from __future__ import annotations

import click

from bkpool.cli import console, options


@click.command(short_help="Get the tools that bkpool runs, and show where they are.")
@click.argument("names", metavar="[TOOL]...", nargs=-1)
@click.option("--clean", is_flag=True, help="Only remove what Go downloaded and compiled for them; the tools stay.")
@options.as_json
def command(names: tuple[str, ...], clean: bool, as_json: bool) -> None:
    """Get the tools that bkpool runs and this machine does not have, and show where they are.

    With names of tools, only their paths are printed, one on each line, also if stdout is not a terminal.
    """
    from bkpool.cli import tools  # noqa: PLC0415 - the toolchain is slow to import
    from bkpool.core.errors import InvalidInput  # noqa: PLC0415
    from bkpool.toolchain import Tool, Toolchain, default_cache  # noqa: PLC0415

    if clean:
        Toolchain(default_cache()).clean()
        console.answer({"cleaned": True}, as_json=as_json, show=lambda: "the caches of Go are removed")
        return
    unknown = [name for name in names if name not in set(Tool)]
    if unknown:
        raise InvalidInput(
            f"TOOL: there is no tool {unknown[0]!r}", hint=f"The tools are {', '.join(Tool)}.", field="TOOL"
        )
    wanted = [Tool(name) for name in names] or [tool for tool in Tool if tool is not Tool.KIND]
    paths = {str(tool): str(path) for tool, path in tools.ensure(wanted).items()}
    if names and not as_json:
        click.echo("\n".join(paths.values()))
        return
    console.answer(
        paths, as_json=as_json, show=lambda: "\n".join(f"{tool:12} {path}" for tool, path in paths.items())
    )
