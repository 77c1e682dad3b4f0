"""Accuracy against what it costs: the points of a comparison, and the frontier of those that nothing else dominates.

* :func:`small_multiples` — one SVG a cost (latency by batch size, file size), a few kilobytes each, coloured by CSS variables.
* :func:`figure` — the same in plotly, to zoom and point at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from workbench.comparison.result import Measurement, on_frontier

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = ("#3f78d8", "#c9800a", "#23937a", "#8f63d6", "#b4508f", "#70923a", "#7b858f")
"""By variant, in order; none is red, which means worse."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 40, 14, 24, 40


@dataclass(frozen=True)
class Point:
    """A row at what it costs; shares from 0 to 1."""

    row: Measurement
    x: float
    best: bool
    """Whether no other point of the same drawing is at least as accurate and as cheap, and better in one."""


@dataclass(frozen=True)
class Panel:
    """One cost, and the points by it, the cheapest first."""

    title: str
    unit: str
    points: list[Point]


def panels_of(rows: Sequence[Measurement]) -> list[Panel]:
    """Latency at each batch size, by row; file size, by variant."""
    found = []
    for index, latency in enumerate(rows[0].latencies):
        points = _points(rows, lambda row, i=index: row.latencies[i].p50_ms)  # type: ignore[misc]
        found.append(Panel(f"Latency at batch {latency.batch}", "ms, median", points))
    once = list({row.variant: row for row in rows if "bf16" not in row.form or len(rows) == 1}.values()) or list(rows)
    return [*found, Panel("File", "MB", _points(once, lambda row: row.file_bytes / 1e6))]


def variant_colours(rows: Iterable[Measurement]) -> dict[str, str]:
    """A colour a variant, in the order of the rows."""
    names = dict.fromkeys(row.variant for row in rows)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def small_multiples(rows: Sequence[Measurement]) -> list[tuple[str, str]]:
    """(title, SVG) of each cost, all with the same accuracy axis."""
    colours = variant_colours(rows)
    low = 100 * min(row.accuracy_low for row in rows)
    high = 100 * max(row.accuracy_high for row in rows)
    room = 0.06 * (high - low) or 1.0
    span = max(0.0, low - room), min(100.0, high + room)
    return [(panel.title, _svg(panel, colours, span)) for panel in panels_of(rows)]


def _points(rows: Iterable[Measurement], cost: Callable[[Measurement], float]) -> list[Point]:
    rows = list(rows)
    best = on_frontier([(1 - row.accuracy, cost(row)) for row in rows])
    return sorted((Point(row, cost(row), b) for row, b in zip(rows, best, strict=True)), key=lambda p: (p.x, p.row.accuracy))


# SVG --------------------------------------------------------------------------------------------------------------------


def _svg(panel: Panel, colours: dict[str, str], span: tuple[float, float]) -> str:
    low, high = span
    most = max(point.x for point in panel.points)
    least = min(point.x for point in panel.points)
    log = least > 0 and most / least > 20
    start, end = (math.log10(least) - 0.08, math.log10(most) + 0.08) if log else (0.0, 1.06 * most or 1.0)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((math.log10(x) if log else x) - start) / (end - start)

    def up(percent: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (percent - low) / (high - low)

    floor = HEIGHT - BOTTOM
    parts = []
    for tick in _ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _log_ticks(start, end) if log else _ticks(start, end):
        parts.append(f'<text x="{across(tick):.1f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(panel.unit)}</text>')
    parts.append('<text x="0" y="10">accuracy, %</text>')
    parts.append(_frontier(panel.points, across, up))
    for point in panel.points:  # the intervals first, so that marks lie on top
        row, x = point.row, across(point.x)
        low_y, high_y = up(100 * row.accuracy_low), up(100 * row.accuracy_high)
        parts.append(f'<path class="interval" stroke="{colours[row.variant]}" d="M{x:.1f} {low_y:.1f}V{high_y:.1f}"/>')
    for point in panel.points:
        parts.append(_mark(point, across(point.x), up(100 * point.row.accuracy), colours[point.row.variant], panel))
    label = f"Accuracy against {panel.title.lower()}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _frontier(points: Sequence[Point], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """What accuracy is to be had at a cost: a line that rises at each point of the frontier."""
    best = sorted((p for p in points if p.best), key=lambda p: p.x)
    path = f"M{across(best[0].x):.1f} {HEIGHT - BOTTOM}" + "".join(
        f"H{across(p.x):.1f}V{up(100 * p.row.accuracy):.1f}" for p in best
    )
    return f'<path class="frontier" d="{path}H{WIDTH - RIGHT}"><title>frontier</title></path>'


def _mark(point: Point, x: float, y: float, colour: str, panel: Panel) -> str:
    """Open circle: eager; circle: compiled; diamond: bf16; square: integers or FP8."""
    row = point.row
    form = f", {row.form}" if panel.title != "File" else ""
    words = f"{row.variant}{form}: {100 * row.accuracy:.2f} %, {point.x:.3g} {panel.unit.split(',')[0]}"
    title = f"<title>{escape(words)}{' (frontier)' if point.best else ''}</title>"
    if "bf16" in row.form:
        shape = f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5-5.5z"/>'
    elif "fp32" in row.form:
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    else:
        shape = f'<rect x="{x - 4.2:.1f}" y="{y - 4.2:.1f}" width="8.4" height="8.4"/>'
    kind = "mark open" if row.form.startswith("eager") and panel.title != "File" else "mark"
    return f'<g class="{kind}{"" if point.best else " dominated"}" style="--c:{colour}">{title}{shape}</g>'


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(index * step, 9) for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    found = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 2, 5)]
    inside = [tick for tick in found if low <= math.log10(tick) <= high]
    return inside if len(inside) < 8 else [tick for tick in inside if f"{tick:e}".startswith("1")]


# Plotly -----------------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Measurement]) -> go.Figure:
    """The small multiples as one figure; one colour a variant, one mark a form, the frontier as a step."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels, colours = panels_of(rows), variant_colours(rows)
    drawn = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04)
    shown: set[str] = set()
    for column, panel in enumerate(panels, start=1):
        best = [point for point in panel.points if point.best]
        drawn.add_trace(
            go.Scatter(
                x=[p.x for p in best],
                y=[100 * p.row.accuracy for p in best],
                mode="lines",
                line={"shape": "hv", "width": 1, "color": "#999", "dash": "dot"},
                name="frontier",
                legendgroup="frontier",
                showlegend=column == 1,
                hoverinfo="skip",
            ),
            row=1,
            col=column,
        )
        for point in panel.points:
            row, name = point.row, f"{escape(point.row.variant)}, {point.row.form}"
            drawn.add_trace(
                go.Scatter(
                    x=[point.x],
                    y=[100 * row.accuracy],
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": [100 * (row.accuracy_high - row.accuracy)],
                        "arrayminus": [100 * (row.accuracy - row.accuracy_low)],
                        "thickness": 1,
                    },
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    mode="markers",
                    marker={"color": colours[row.variant], "size": 10, "symbol": _symbol(row.form)},
                    hovertemplate=f"{name}<br>%{{x:.3g}}<br>%{{y:.2f}} %<extra></extra>",
                ),
                row=1,
                col=column,
            )
            shown.add(name)
        drawn.update_xaxes(title_text=f"{panel.title} ({panel.unit})", rangemode="tozero", row=1, col=column)
    drawn.update_yaxes(title_text="accuracy (%, 95 % interval)", row=1, col=1)
    return drawn.update_layout(template="plotly_white", height=420, margin={"t": 30, "r": 10, "l": 60, "b": 50})


def _symbol(form: str) -> str:
    shape = "diamond" if "bf16" in form else "circle" if "fp32" in form else "square"
    return f"{shape}-open" if form.startswith("eager") else shape
