"""Accuracy against cost: one point a variant and form, with its interval, as SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from widgets.markup import Html, tag
from widgets.svg import INK

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 40


def scatter(rows: Sequence[Mapping[str, Any]], x: str, x_title: str) -> Html:
    """Accuracy (percent, with its 95 % interval) over the column ``x``, logarithmic; a legend of the variants below.

    Args:
        rows: of a comparison; ``variant``, ``form``, ``accuracy``, ``accuracy_low``, ``accuracy_high`` and ``x`` are read.
        x_title: what the horizontal axis counts.
    """
    points = [row for row in rows if row[x] and row[x] > 0 and row["accuracy"] == row["accuracy"]]
    if not points:
        return Html()
    low, high = _padded([math.log10(row[x]) for row in points], 0.06)
    bottom, top = _padded([100 * row[name] for row in points for name in ("accuracy_low", "accuracy_high")], 0.05)
    top = min(top, 100.5)

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)

    def up(percent: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (percent - bottom) / (top - bottom)

    floor, parts = HEIGHT - BOTTOM, []
    for tick in _ticks(bottom, top):
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_at(up(tick)), y2=_at(up(tick)), stroke="var(--wb-line)"))
        parts.append(tag("text", f"{tick:g} %", x=LEFT - 8, y=_at(up(tick) + 4), text_anchor="end"))
    for tick in _log_ticks(low, high):
        parts.append(tag("text", f"{tick:g}", x=_at(at(tick)), y=floor + 16, text_anchor="middle"))
    parts.append(tag("text", x_title, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    names = list(dict.fromkeys(str(row["variant"]) for row in points))
    colours = {name: INK[index % len(INK)] for index, name in enumerate(names)}
    for row in points:
        cx, cy, colour, form = at(row[x]), up(100 * row["accuracy"]), colours[str(row["variant"])], str(row["form"])
        low_y, high_y = (_at(up(100 * row[name])) for name in ("accuracy_low", "accuracy_high"))
        interval = tag("line", x1=_at(cx), x2=_at(cx), y1=low_y, y2=high_y, opacity=0.45)
        words = f"{row['variant']}, {form}: {100 * row['accuracy']:.2f} %, {row[x]:.3g}"
        parts.append(tag("g", tag("title", words), interval, _mark(form, cx, cy, colour), stroke=colour))
    svg = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"Accuracy over {x_title}")
    legend = [tag("li", tag("i", style=f"background:{colours[name]}"), name) for name in names]
    return tag(
        "figure", svg, tag("ul", legend, tag("li", "○ eager · ● compiled · ◆ bf16 · ■ int8", cls="quiet")), cls="wb-scatter"
    )


def _at(value: float) -> str:
    return f"{value:.1f}"


def _mark(form: str, x: float, y: float, colour: str) -> Html:
    if "int8" in form:
        return tag("rect", x=_at(x - 4.5), y=_at(y - 4.5), width=9, height=9, fill=colour)
    if "bf16" in form:
        turn = f"rotate(45 {x:.1f} {y:.1f})"
        return tag("rect", x=_at(x - 4), y=_at(y - 4), width=8, height=8, fill=colour, transform=turn)
    fill = colour if "compiled" in form else "var(--wb-surface)"
    return tag("circle", cx=_at(x), cy=_at(y), r=5, fill=fill, stroke_width=1.5)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * share or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 5)
    return [round(k * step, 6) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    candidates = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 2, 5)]
    inside = [tick for tick in candidates if low <= math.log10(tick) <= high]
    return inside if len(inside) > 2 else _ticks(10**low, 10**high)
