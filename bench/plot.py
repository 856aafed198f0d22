"""Draws the comparison: for each load the ratio of each proxy to nginx, on a logarithmic scale. It is pure.

The SVG has a background and follows the light or dark setting of the reader, so that any page can show it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from bench.peers import LEGS
from bench.table import ratios

_WIDTH, _LABELS, _MARGIN, _GAP = 960, 300, 24, 36
_TOP, _ROW, _HEADING, _BOTTOM = 104, 30, 34, 44
_TICKS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
_PEERS = ("HAProxy", "ghostunnel", "bkpool")
_STYLE = """
svg { font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; font-size: 13px; }
.page { fill: #ffffff; stroke: #d1d9e0; } text { fill: #1f2328; } .quiet { fill: #59636e; font-size: 12px; }
.title { font-size: 16px; font-weight: 600; } .strong { font-weight: 600; } .grid { stroke: #d1d9e0; }
.nginx { stroke: #59636e; stroke-width: 1.5; } .bkpool { fill: #0969da; stroke: #0969da; }
.HAProxy { fill: #bc4c00; stroke: #bc4c00; } .ghostunnel { fill: #1b7c83; stroke: #1b7c83; }
line.bkpool, line.HAProxy, line.ghostunnel { stroke-width: 2; stroke-opacity: 0.45; stroke-linecap: round; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d; } text { fill: #e6edf3; } .quiet { fill: #9198a1; }
.grid { stroke: #2f353d; } .nginx { stroke: #9198a1; } .bkpool { fill: #4493f8; stroke: #4493f8; }
.HAProxy { fill: #e0823d; stroke: #e0823d; } .ghostunnel { fill: #39c5cf; stroke: #39c5cf; }
}
"""


def svg(document: Mapping[str, Any]) -> str:
    """Returns the picture of a document's comparison.

    Raises:
        ValueError: The document has no comparison, or none with nginx.
    """
    rows = [row for row in document.get("gateway", []) if any(ratios(row, peer) for peer in _PEERS)]
    if not rows:
        raise ValueError("there is no comparison with nginx to draw")
    legs = [leg for leg in LEGS if any(row["leg"] == leg for row in rows)]
    across = (_WIDTH - _LABELS - 2 * _MARGIN - _GAP * (len(legs) - 1)) / len(legs)
    lefts = {leg: _MARGIN + _LABELS + number * (across + _GAP) for number, leg in enumerate(legs)}
    low, high = _range(rows)

    def place(leg: str, ratio: float) -> float:
        share = (math.log(min(max(ratio, low), high)) - math.log(low)) / (math.log(high) - math.log(low))
        return lefts[leg] + share * across

    body, bottom = _groups(rows, place)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    middles = {leg: left + across / 2 for leg, left in lefts.items()}
    frame = [*_title(), *_scale(middles, bottom, ticks, place)]
    height = bottom + _BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            "<title>The gateway against nginx, HAProxy and ghostunnel</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *frame,
            *body,
            "</svg>\n",
        ]
    )


def _range(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the ends of the scale: the ticks around all medians."""
    medians = [statistics.median(found) for row in rows for peer in _PEERS if (found := ratios(row, peer))]
    low = max((tick for tick in _TICKS if tick <= min(0.5, *medians)), default=_TICKS[0])
    high = min((tick for tick in _TICKS if tick >= max(1.4, *medians)), default=_TICKS[-1])
    return low / 1.04, high * 1.04


def _groups(rows: Sequence[Mapping[str, Any]], place: Callable[[str, float], float]) -> tuple[list[str], int]:
    """Draws a line for each load, first those where more is better. Returns the lines and the end of the last one."""
    drawn: list[str] = []
    y = _TOP
    for more, title in ((True, "more is better →"), (False, "← less is better")):
        titles = dict.fromkeys((row["title"], row["unit"]) for row in rows if row["more_is_better"] is more)
        if not titles:
            continue
        drawn.append(_text(_MARGIN, y + 20, title, "quiet"))
        y += _HEADING
        for name, unit in titles:
            drawn.append(_text(_MARGIN, y + 11, _short(name), "strong"))
            drawn.append(_text(_MARGIN, y + 25, unit, "quiet"))
            for row in rows:
                if (row["title"], row["unit"]) == (name, unit):
                    drawn += _marks(row, y + 16, place)
            y += _ROW + 6
    return drawn, y


def _marks(row: Mapping[str, Any], y: int, place: Callable[[str, float], float]) -> list[str]:
    drawn = []
    for peer, beside in zip(_PEERS, (-7, 7, 0), strict=True):
        found = ratios(row, peer)
        if not found:
            continue
        left, right = (place(row["leg"], end) for end in (min(found), max(found)))
        x, at = place(row["leg"], statistics.median(found)), y + beside
        drawn.append(f'<line class="{peer}" x1="{left:.1f}" x2="{right:.1f}" y1="{at}" y2="{at}"/>')
        drawn.append(_mark(peer, x, at))
    return drawn


def _mark(peer: str, x: float, y: float) -> str:
    """Draws a mark. Proxies differ in shape and in colour."""
    if peer == "bkpool":
        return f'<circle class="{peer}" cx="{x:.1f}" cy="{y}" r="5.5"/>'
    if peer == "HAProxy":
        return f'<rect class="{peer}" x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7"/>'
    return f'<path class="{peer}" d="M{x:.1f} {y - 4.5} l4.5 8 h-9 z"/>'


def _title() -> list[str]:
    """And the legend."""
    what = "one core, the same TLS on the same legs; medians, lines from minimum to maximum"
    drawn = [_text(_MARGIN, 32, "The gateway against other proxies, nginx = 1", "title")]
    drawn.append(_text(_MARGIN, 52, what, "quiet"))
    for name, x in (("bkpool", 690), ("HAProxy", 765), ("ghostunnel", 850)):
        drawn += [_mark(name, x, 28), _text(x + 11, 32, name)]
    return drawn


def _scale(
    middles: Mapping[str, float], bottom: int, ticks: Sequence[float], place: Callable[[str, float], float]
) -> list[str]:
    """Draws the name of each leg, and a grid for the ratios."""
    drawn = []
    for leg, middle in middles.items():
        drawn.append(_text(middle, 82, LEGS[leg], "strong", "middle"))
        for tick in ticks:
            at, kind = place(leg, tick), "nginx" if tick == 1 else "grid"
            drawn.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 12}" y2="{bottom}"/>')
            drawn.append(_text(at, bottom + 18, f"{tick:g}", "quiet", "middle"))
    return drawn


def _short(title: str) -> str:
    """Shortens a title to the available space."""
    return title.partition(", each")[0].partition(", median")[0]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}"{name}>{escape(text)}</text>'
