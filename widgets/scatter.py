"""Accuracy against cost: one point a variant and form, with its interval, as SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from widgets.svg import INK

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 40


def scatter(rows: Sequence[Mapping[str, Any]], x: str, x_title: str) -> str:
    """Accuracy (percent, with its 95 % interval) over the column ``x``, logarithmic; a legend of the variants below.

    Args:
        rows: of a comparison; ``variant``, ``form``, ``accuracy``, ``accuracy_low``, ``accuracy_high`` and ``x`` are read.
        x_title: what the horizontal axis counts.
    """
    points = [row for row in rows if row[x] and row[x] > 0 and row["accuracy"] == row["accuracy"]]
    if not points:
        return ""
    low, high = _padded([math.log10(row[x]) for row in points], 0.06)
    bottom, top = _padded([100 * row[name] for row in points for name in ("accuracy_low", "accuracy_high")], 0.05)
    top = min(top, 100.5)

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)

    def up(percent: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (percent - bottom) / (top - bottom)

    parts = []
    for tick in _ticks(bottom, top):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" stroke="var(--wb-line)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g} %</text>')
    for tick in _log_ticks(low, high):
        parts.append(f'<text x="{at(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    names = list(dict.fromkeys(str(row["variant"]) for row in points))
    for row in points:
        colour = INK[names.index(str(row["variant"])) % len(INK)]
        cx, cy = at(row[x]), up(100 * row["accuracy"])
        parts.append(
            f'<g stroke="{colour}"><title>{escape(str(row["variant"]))}, {escape(str(row["form"]))}: '
            f'{100 * row["accuracy"]:.2f} %, {row[x]:.3g}</title><line x1="{cx:.1f}" x2="{cx:.1f}" '
            f'y1="{up(100 * row["accuracy_low"]):.1f}" y2="{up(100 * row["accuracy_high"]):.1f}" opacity="0.45"/>{_mark(str(row["form"]), cx, cy, colour)}</g>'
        )
    legend = "".join(f'<li><i style="background:{INK[i % len(INK)]}"></i>{escape(name)}</li>' for i, name in enumerate(names))
    label = f"Accuracy over {x_title}"
    return (
        f'<figure class="wb-scatter"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, True)}">{"".join(parts)}</svg>'
        f"<ul>{legend}<li class=\"quiet\">○ eager · ● compiled · ◆ bf16 · ■ int8</li></ul></figure>"
    )


def _mark(form: str, x: float, y: float, colour: str) -> str:
    if "int8" in form:
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{colour}"/>'
    if "bf16" in form:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}" transform="rotate(45 {x:.1f} {y:.1f})"/>'
    fill = colour if "compiled" in form else "var(--wb-surface)"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke-width="1.5"/>'


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * share or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 5)
    return [round(k * step, 6) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    found = [d * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for d in (1, 2, 5) if low <= math.log10(d * 10**e) <= high]
    return found or [float(f"{10 ** ((low + high) / 2):.2g}")]
