"""`bkpool version`: what this is, and with --verbose what it runs on."""

from __future__ import annotations

import os
import platform
import sys

import click

from bkpool import __version__
from bkpool.cli import console, options


@click.command(short_help="Show the version.")
@click.option("-v", "--verbose", is_flag=True, help="Also what it runs on, and where its files are.")
@options.as_json
def command(verbose: bool, as_json: bool) -> None:
    """Show the version."""
    told = {"version": __version__}
    if verbose:
        told |= {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "libc": " ".join(platform.libc_ver()) or "unknown",
            "program": os.environ.get("PEX") or sys.argv[0],
            "zipappSupports": os.environ.get("BKPOOL_ZIPAPP_SUPPORTS", "not run from the zipapp"),
        }
    rows = [f"bkpool {__version__}", *(f"  {name}: {value}" for name, value in told.items() if name != "version")]
    console.answer(told, as_json=as_json, show=lambda: "\n".join(rows))
