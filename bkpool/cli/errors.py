"""The one place where whatever goes wrong becomes one line on stderr and an exit code.

A user never sees a traceback: that of an unexpected error goes to `<home>/logs/crash.log`, or to stderr with
BKPOOL_DEBUG=1.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import click

from bkpool.cli import home
from bkpool.core.errors import BkpoolError

INTERRUPTED = 128 + signal.SIGINT
INTERNAL = 70
"""sysexits' EX_SOFTWARE."""


def guarded(call: Callable[[], Any], name: str = "bkpool") -> int:
    """Runs a click program and returns its exit code, having told the user what went wrong.

    Args:
        call: Runs click with `standalone_mode=False`; an int that it returns is the exit code.
        name: What the program was called as.
    """
    try:
        result = call()
    except BkpoolError as error:
        tell(error)
        return error.exit_code
    except click.ClickException as error:
        _say(_of_click(error, name))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last resort is what this function is for
        _say(f"error: internal error ({type(error).__name__}); please report it{_kept(error)}")
        return INTERNAL
    return result if isinstance(result, int) else 0


def tell(error: BkpoolError) -> None:
    """Writes an error and its hint to stderr."""
    _say(f"error: {error.message}")
    if error.hint:
        _say(f"hint: {error.hint}")


def _say(text: str) -> None:
    """Control characters are dropped: a message may quote what a server or a file said."""
    shown = "".join(char for char in text if char.isprintable() or char in "\n\t")
    click.echo(shown.rstrip(), err=True)


def _of_click(error: click.ClickException, name: str) -> str:
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
    text = error.format_message()
    return f"error: {text[:1].lower()}{text[1:].removesuffix('.')}\nhint: See `{command} --help`."


def _kept(error: Exception) -> str:
    import traceback  # noqa: PLC0415 - only a crash needs it

    told = "".join(traceback.format_exception(error))
    if os.environ.get("BKPOOL_DEBUG"):
        return f"\n{told}"
    path = home.home() / "logs" / "crash.log"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
            file.write(told)
    except OSError:
        return "; BKPOOL_DEBUG=1 shows where"
    return f" with {path}"
