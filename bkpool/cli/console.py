"""What a user sees: answers on stdout (JSON when that is no terminal), everything else on stderr.

rich is imported only where something is really drawn. Nothing here decides an exit code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from threading import Lock, Timer
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status
    from rich.table import Table

PATIENCE = 1.0
"""Seconds that pass before a wait is worth a word."""
SIGN_OF_LIFE = 10.0
"""Seconds after which a plain line says again what is being waited for."""


def table(
    heads: Iterable[str], rows: Iterable[Sequence[RenderableType]], *, long: Collection[str] = frozenset()
) -> Table:
    """A table for a terminal; only the columns named in `long` are broken into lines."""
    from rich.table import Table  # noqa: PLC0415 - on a terminal only
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head not in long)
    for row in rows:
        # Text, so that nothing in a name is taken for rich's markup.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def note(text: str) -> None:
    """Tells the user something beside the answer."""
    click.echo(text, err=True)


def answer(data: Mapping[str, Any], *, as_json: bool, show: Callable[[], RenderableType | str]) -> None:
    """Writes a command's answer.

    Args:
        data: The answer for programs, written when `as_json` is set or stdout is no terminal.
        as_json: The user asked for JSON.
        show: Makes the answer for people: a string, or something that rich draws.
    """
    if as_json or not sys.stdout.isatty():
        click.echo(json.dumps(data, indent=2))
        return
    shown = show()
    if isinstance(shown, str):
        click.echo(shown)
        return
    from rich.console import Console  # noqa: PLC0415 - see above

    Console().print(shown)


class Progress:
    """Says on stderr what is being waited for, once the wait has lasted a second.

    On a terminal it is one line with a spinner, which disappears. Elsewhere it is a plain line for each new subject
    (what stands before the colon), and a sign of life now and then: a log of CI must stay readable.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = Lock()
        self._open = False
        self._noted = 0.0
        self._drawn: Status | None = None
        self._timer = Timer(PATIENCE, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._open = False
            if self._drawn is not None:
                self._drawn.stop()
        self._timer.join()

    def update(self, text: str, fraction: float | None = None) -> None:
        """Says something new from now on; how much of it is done (0 to 1) is shown on a terminal only."""
        with self._lock:
            if self._drawn is not None:
                self._drawn.update(text if fraction is None else f"{text} ({fraction:.0%})")
            elif self._open and self._worth_a_line(text):
                self._note(text)
            self._text = text

    def _worth_a_line(self, text: str) -> bool:
        if text.partition(":")[0] != self._text.partition(":")[0]:
            return True
        return text != self._text and monotonic() - self._noted >= SIGN_OF_LIFE

    def _note(self, text: str) -> None:
        self._noted = monotonic()
        note(text)

    def _show(self) -> None:
        with self._lock:
            if self._timer.finished.is_set():
                return
            self._open = True
            if not sys.stderr.isatty():
                self._note(self._text)
                return
            from rich.console import Console  # noqa: PLC0415 - a short wait never needs it

            self._drawn = Console(stderr=True, markup=False).status(self._text)
            self._drawn.start()
