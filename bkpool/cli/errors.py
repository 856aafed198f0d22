"""The one place where an error becomes one line on stderr and an exit code.

A user does not see a traceback. The traceback of an unexpected error goes to `<home>/logs/crash.log`, or with
BKPOOL_DEBUG=1 to stderr.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

from bkpool.cli import home
from bkpool.core.errors import BkpoolError

INTERRUPTED = 128 + signal.SIGINT
INTERNAL = 70
"""sysexits' EX_SOFTWARE."""
_CRASH_LOG_SIZE = 1024 * 1024  # bytes: a larger one begins again


def guarded(call: Callable[[], Any], name: str = "bkpool") -> int:
    """Runs a click program, shows its error if there is one, and returns the exit code.

    Args:
        call: Runs click with `standalone_mode=False`; an int that it returns is the exit code.
        name: The name under which the program was called.
    """
    try:
        result = call()
    except BkpoolError as error:
        show_error(error)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        _print(_of_click(error, name))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - this is the last resort
        return _unexpected(error)
    return result if isinstance(result, int) else 0


def _unexpected(error: Exception) -> int:
    fault = home.fault_at_home(error) if isinstance(error, OSError) else None
    if fault is None:
        _print(f"error: internal error ({type(error).__name__}); please report it{_save_traceback(error)}")
        return INTERNAL
    show_error(fault)
    return fault.exit_code


def show_error(error: BkpoolError) -> None:
    """Writes an error and its hint to stderr."""
    _print(f"error: {error.message}")
    if error.hint:
        _print(f"hint: {error.hint}")


def _print(text: str) -> None:
    """Writes to stderr without control characters: a message may quote a server or a file."""
    shown = "".join(char for char in text if char.isprintable() or char in "\n\t")
    with suppress(OSError):  # who read stderr may have gone; the exit code still tells
        click.echo(shown.rstrip(), err=True)


def _of_click(error: click.ClickException, name: str) -> str:
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
    text = error.format_message()
    return f"error: {text[:1].lower()}{text[1:].removesuffix('.')}\nhint: See `{command} --help`."


def _save_traceback(error: Exception) -> str:
    import traceback  # noqa: PLC0415 - only a crash needs it

    text = "".join(traceback.format_exception(error))
    if os.environ.get("BKPOOL_DEBUG"):
        return f"\n{text}"
    try:
        path = home.home() / "logs" / "crash.log"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        full = path.exists() and path.stat().st_size > _CRASH_LOG_SIZE
        how = os.O_TRUNC if full else os.O_APPEND
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600), "w") as file:
            file.write(text)
    except (OSError, BkpoolError):
        return "; BKPOOL_DEBUG=1 shows the traceback"
    return f" with {path}"
