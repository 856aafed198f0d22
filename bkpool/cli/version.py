"""`bkpool version`: shows the version, and with --verbose the platform."""

from __future__ import annotations

import os
import platform
import sys

import click

from bkpool import __version__
from bkpool.cli import console, options


@click.command(short_help="Show the version.")
@click.option("-v", "--verbose", is_flag=True, help="Also show the platform and where the program is.")
@options.as_json
def command(verbose: bool, as_json: bool) -> None:
    """Show the version."""
    answer = {"version": __version__}
    if verbose:
        answer |= {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "libc": " ".join(platform.libc_ver()) or "unknown",
            "program": os.environ.get("PEX") or sys.argv[0],
            "zipappSupports": os.environ.get("BKPOOL_ZIPAPP_SUPPORTS", "not run from the zipapp"),
        }
    rows = [f"bkpool {__version__}", *(f"  {name}: {value}" for name, value in answer.items() if name != "version")]
    console.answer(answer, as_json=as_json, show=lambda: "\n".join(rows))
