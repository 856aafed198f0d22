"""Draws a history: clients and workers are rows, builds are bars, faults are marks across the rows.

It is pure: it turns events into an SVG. It judges nothing: history.py finds violations, and this module marks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from chaos.history import Event, Harm, builds, harms, holds

_LEFT, _TOP, _ROW, _BAR = 130, 60, 26, 14
_PER_SECOND, _WIDEST = 24.0, 12_000.0
_WELL, _FAILED, _WAITED, _HELD, _FAULT, _WRONG = "#4c9f70", "#d1495b", "#e6e6e6", "#a9c6de", "#f4a259", "#b00020"


def draw(events: Sequence[Event], violations: Sequence[str]) -> str:
    """Returns the whole run as an SVG document."""
    seen = sorted(events, key=lambda event: event.at)
    end = max((event.at for event in seen), default=1.0)
    scale = min(_PER_SECOND, _WIDEST / end)
    clients = sorted({event.who for event in seen if event.what == "ask"})
    workers = sorted({hold.worker for hold in holds(seen)})
    rows = {name: _TOP + _ROW * number for number, name in enumerate(["faults", *clients, *workers])}
    width, height = _LEFT + end * scale + 20, _TOP + _ROW * len(rows) + 20
    legend = f"{len(violations)} violations; builds green or red, waits grey, leases blue, faults orange"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}">',
        "<style>text {font: 11px sans-serif}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="6" y="16">{legend}</text>',
    ]
    parts += _axis(end, scale, height)
    parts += [f'<text x="6" y="{y + _BAR - 3}">{escape(name)}</text>' for name, y in rows.items()]
    parts += _faults(seen, rows, scale, height)
    parts += _bars(seen, rows, scale)
    for text in violations:
        if at := re.match(r"([\d.]+):", text):
            x = _LEFT + float(at[1]) * scale
            parts.append(
                f'<path d="M{x:.1f} {_TOP - 8}V{height - 20:.0f}" stroke="{_WRONG}" stroke-width="2">'
                f"<title>{escape(text)}</title></path>"
            )
    return "\n".join([*parts, "</svg>\n"])


def _axis(end: float, scale: float, height: float) -> Iterator[str]:
    step = 5 if scale > _PER_SECOND / 3 else 30
    for second in range(0, int(end) + 1, step):
        x = _LEFT + second * scale
        yield f'<text x="{x:.0f}" y="36" fill="#777">{second} s</text>'
        yield f'<path d="M{x:.0f} 40V{height - 20:.0f}" stroke="#eee"/>'


def _faults(events: list[Event], rows: dict[str, int], scale: float, height: float) -> Iterator[str]:
    for harm in harms(events):
        x, width = _LEFT + harm.begin * scale, max(2.0, (harm.end - harm.begin) * scale)
        title = _title_of(harm)
        yield _rect(x, rows["faults"], width, _FAULT, title)
        if harm.worker in rows:
            yield _rect(x, rows[harm.worker] - 2, width, _FAULT, title, tall=4)
        elif not harm.worker:
            yield f'<text x="{x:.1f}" y="{rows["faults"] - 4}">{escape(harm.kind)}</text>'
            yield (
                f'<rect x="{x:.1f}" y="{_TOP}" width="{width:.1f}" height="{height - _TOP - 20:.0f}" '
                f'fill="{_FAULT}" opacity="0.15"/>'
            )


def _title_of(harm: Harm) -> str:
    worker = f" {harm.worker}" if harm.worker else ""
    return f"{harm.kind}{worker}: {harm.begin:.2f} - {harm.end:.2f}"


def _bars(events: list[Event], rows: dict[str, int], scale: float) -> Iterator[str]:
    asked = {event.of["call"]: event for event in events if event.what == "ask"}
    for event in events:
        if event.what == "answer":
            begin = asked[event.of["call"]].at
            title = f"{event.of['outcome']} {event.of.get('message', '')} after {event.at - begin:.2f} s"
            yield _rect(_LEFT + begin * scale, rows[event.who], (event.at - begin) * scale, _WAITED, title)
    for hold in holds(events):
        title = f"{hold.who} held {hold.worker} ({hold.lease}): {hold.begin:.2f} - {hold.end:.2f}"
        x, width = _LEFT + hold.begin * scale, (hold.end - hold.begin) * scale
        yield _rect(x, rows[hold.worker], width, _HELD, title)
        yield f'<text x="{x + 2:.1f}" y="{rows[hold.worker] + _BAR - 3}">{escape(hold.who)}</text>'
    for build in builds(events):
        title = f"{build.name} on {build.worker}: {build.begin:.2f} - {build.end:.2f} {build.of['sentence']}"
        colour = _WELL if build.ok else _FAILED
        yield _rect(_LEFT + build.begin * scale, rows[build.who], (build.end - build.begin) * scale, colour, title)


def _rect(x: float, y: float, width: float, colour: str, title: str, tall: int = _BAR) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(1.0, width):.1f}" height="{tall}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )
