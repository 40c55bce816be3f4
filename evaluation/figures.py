"""Line charts as SVG text: what the report needs and no more.

A chart is one element that stands in a page by itself: no script, no style sheet, no font file. Its
title and description are read out by a screen reader; lines differ in colour (Okabe and Ito's, told
apart by colour-blind readers) and in their dashes, so a black-and-white print shows them too.

Invariant: every text that goes in is escaped, and the same numbers make the same bytes.
"""

import math
import textwrap
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 12, 46
LEGEND_ROW = 20
LEGEND_WIDTH = 32  # characters, of wide letters too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#444444")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 5", "4 2")
UNIT_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Line(NamedTuple):
    """One line of a chart, from its first point to its last."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False  # a dot on every point, for lines of few points


class Axis(NamedTuple):
    """What an axis shows: its name, its range and the numbers that stand on it."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]

    @classmethod
    def around(cls, label: str, values: Sequence[float]) -> "Axis":
        """An axis that holds all values, with four to seven round numbers on it."""
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [round(i * step, 12) for i in range(first, last + 1)]
        return cls(label, ticks[0], ticks[-1], ticks)


def chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    diagonal: str | None = None,
) -> str:
    """Return the chart as an svg element whose ids begin with `name`, an identifier of the page.

    diagonal: what the line from corner to corner means; None for no such line.
    """
    legend = [line.label for line in lines] + ([diagonal] if diagonal else [])
    wrapped = [textwrap.wrap(label, LEGEND_WIDTH) or [""] for label in legend]
    height = HEIGHT + LEGEND_ROW * sum(map(len, wrapped)) + 6
    # The axis's name stands left of its longest number, at most 8.5 a digit.
    margin = max(LEFT, 26 + 8 * max(len(_number(tick)) for tick in y.ticks))

    def at(point: tuple[float, float]) -> str:
        across = (point[0] - x.low) / (x.high - x.low)
        up = (point[1] - y.low) / (y.high - y.low)
        left = margin + across * (WIDTH - margin - RIGHT)
        return f"{left:.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    def text(place: str, words: str, anchor: str = "middle", more: str = "") -> str:
        left, top = place.split(",")
        return (
            f'<text x="{left}" y="{top}" text-anchor="{anchor}"{more}>'
            f"{escape(words, quote=True)}</text>"
        )

    parts = [
        f'<svg class="chart" role="img" aria-labelledby="{name}-title {name}-text" '
        f'viewBox="0 0 {WIDTH} {height}" xmlns="http://www.w3.org/2000/svg" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1a1a1a">',
        f'<title id="{name}-title">{escape(title)}</title>',
        f'<desc id="{name}-text">{escape(description)}</desc>',
    ]
    for tick in x.ticks:
        start, end = at((tick, y.low)), at((tick, y.high))
        left, top = start.split(",")
        parts.append(_stroke([start, end], "#e0e0e0", 1))
        parts.append(text(f"{left},{float(top) + 17:.1f}", _number(tick)))
    for tick in y.ticks:
        start, end = at((x.low, tick)), at((x.high, tick))
        left, top = start.split(",")
        parts.append(_stroke([start, end], "#e0e0e0", 1))
        parts.append(text(f"{float(left) - 7:.1f},{float(top) + 4:.1f}", _number(tick), "end"))
    frame = [at((x.low, y.high)), at((x.low, y.low)), at((x.high, y.low))]
    parts.append(_stroke(frame, "#555555", 1))
    middle = margin + (WIDTH - margin - RIGHT) / 2
    parts.append(text(f"{middle},{HEIGHT - 10}", x.label))
    centre = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(text(f"14,{centre}", y.label, more=f' transform="rotate(-90 14 {centre})"'))
    styles = [(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i in range(len(lines))]
    if diagonal:
        corners = [at((x.low, y.low)), at((x.high, y.high))]
        parts.append(_stroke(corners, "#777777", 1, "3 4"))
        styles.append(("#777777", "3 4"))
    for line, (colour, dashes) in zip(lines, styles, strict=False):
        places = [at(point) for point in line.points]
        parts.append(_stroke(places, colour, 2, dashes))
        if line.dots:
            for place in places:
                left, top = place.split(",")
                parts.append(f'<circle cx="{left}" cy="{top}" r="3.5" fill="{colour}"/>')
    down = HEIGHT + 8
    for label, (colour, dashes) in zip(wrapped, styles, strict=True):
        parts.append(_stroke([f"{LEFT},{down}", f"{LEFT + 34},{down}"], colour, 2, dashes))
        for words in label:
            parts.append(text(f"{LEFT + 42},{down + 4}", words, "start"))
            down += LEGEND_ROW
    return "".join((*parts, "</svg>"))


def _stroke(places: Sequence[str], colour: str, width: int, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
