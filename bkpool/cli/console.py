"""The output of commands: answers on stdout (as JSON if stdout is not a terminal), everything else on stderr.

rich is imported only where something is drawn. Nothing here decides an exit code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from threading import Lock, Timer
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status
    from rich.table import Table

PROGRESS_DELAY = 1.0
"""Seconds: a shorter wait is not shown."""
REPEAT_INTERVAL = 10.0
"""Seconds between two plain lines about the same wait."""


def table(
    headers: Iterable[str], rows: Iterable[Sequence[RenderableType]], *, long: Collection[str] = frozenset()
) -> Table:
    """A table for a terminal. Only the columns named in `long` are broken into several lines."""
    from rich.table import Table  # noqa: PLC0415 - on a terminal only
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header not in long)
    for row in rows:
        # Text, so that rich takes nothing in a name for markup.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def note(text: str) -> None:
    """Writes a line beside the answer."""
    click.echo(text, err=True)


@cache
def note_once(text: str) -> None:
    """Writes a line beside the answer; the same line only once in this process."""
    note(text)


def answer(data: Mapping[str, Any], *, as_json: bool, show: Callable[[], RenderableType | str]) -> None:
    """Writes the answer of a command.

    Args:
        data: The answer for programs, written if `as_json` is set or stdout is not a terminal.
        as_json: Whether the user asked for JSON.
        show: Makes the answer for people: a string, or an object that rich draws.
    """
    if as_json or not sys.stdout.isatty():
        click.echo(json.dumps(data, indent=2))
        return
    shown = show()
    if isinstance(shown, str):
        click.echo(shown)
        return
    from rich.console import Console  # noqa: PLC0415 - only where rich draws

    Console().print(shown)


class Progress:
    """Shows on stderr what the command waits for, once the wait has lasted a second.

    On a terminal it is a line with a spinner, and details below it; they disappear at the end. Elsewhere it is a
    plain line for each new subject (the text before the colon) and one every ten seconds, so that the log of a CI job
    stays readable.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._detail = ""
        self._lock = Lock()
        self._visible = False
        self._last_note = 0.0
        self._spinner: Status | None = None
        self._timer = Timer(PROGRESS_DELAY, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._visible = False
            if self._spinner is not None:
                self._spinner.stop()
        self._timer.join()

    def update(self, text: str, fraction: float | None = None, *, detail: str = "") -> None:
        """Changes the text.

        Args:
            text: One line.
            fraction: The part that is done (0 to 1). Only a terminal shows it.
            detail: Further lines. A terminal always shows them, others see them together with the text.
        """
        with self._lock:
            self._detail = detail
            if self._spinner is not None:
                self._spinner.update(self._whole(text if fraction is None else f"{text} ({fraction:.0%})"))
            elif self._visible and self._needs_line(text):
                self._note(text)
            self._text = text

    def keep(self, text: str) -> None:
        """Writes a line that stays, above the line with the spinner if that is shown."""
        with self._lock:
            if self._spinner is None:
                note(text)
            else:
                self._spinner.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _needs_line(self, text: str) -> bool:
        if text.partition(":")[0] != self._text.partition(":")[0]:
            return True
        return text != self._text and monotonic() - self._last_note >= REPEAT_INTERVAL

    def _note(self, text: str) -> None:
        self._last_note = monotonic()
        note(self._whole(text))

    def _whole(self, text: str) -> str:
        return f"{text}\n{self._detail}" if self._detail else text

    def _show(self) -> None:
        with self._lock:
            if self._timer.finished.is_set():
                return
            self._visible = True
            if not sys.stderr.isatty():
                self._note(self._text)
                return
            from rich.console import Console  # noqa: PLC0415 - a short wait never needs it

            self._spinner = Console(stderr=True, markup=False).status(self._whole(self._text))
            self._spinner.start()
