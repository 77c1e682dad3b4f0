"""A run as a page: one HTML file that needs nothing else, light or dark as the reader's system is.

* :func:`write_report` — writes ``report.html`` into the run's folder.
* :class:`Curve`, :func:`chart` — curves as SVG of a few kilobytes; a non-finite value breaks its curve.
* ``report.html.j2`` — the page. Everything that users name is escaped, and the page's policy forbids scripts and requests.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import events, storage
from workbench.diagnosis import findings_of
from workbench.run import Run

if TYPE_CHECKING:
    import pandas as pd

POINTS = 300
"""Points a curve, at most: of more, the lowest and highest of each stretch are drawn."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 230, 56, 12, 12, 30


def write_report(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run, whatever state it is in; returns where it lies.

    Args:
        path: of the file; by default ``report.html`` in the run's folder.
    """
    target = Path(path) if path is not None else run.path / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(target, render(run))
    return target


def render(run: Run) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workbench", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    history, config = run.history, run.config
    gradients, communication = map(run.readings, ("gradients", "communication"))
    repro = run.path / "repro.py"
    return environment.get_template("report.html.j2").render(
        run=run,
        status=run.status,
        title=config.title,
        facts=_facts(run),
        error=run.error,
        findings=findings_of(run),
        charts=[(heading, Markup(drawing)) for heading, drawing in _charts(history, gradients, communication)],
        metrics=run.metrics,
        settings=_settings(config),
        resolved=run.resolved,
        environment=_flat(_environment(run)),
        code=repro.read_text() if repro.exists() else "",
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


# -- contents -----------------------------------------------------------------------------------------------------------


def _facts(run: Run) -> dict[str, str]:
    """The few facts at the top of the page."""
    said, progress = run.events, run.progress
    facts = {"steps": f"{progress.step:,} of {progress.total_steps:,}", "epochs": str(progress.epoch)}
    starts = [event for event in said if isinstance(event, events.AttemptStarted)]
    if starts:
        facts["parameters"] = f"{starts[-1].parameters:,}"
        facts["device"] = f"{starts[-1].world_size} × {starts[-1].device}"
        facts["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(starts[0].time))
        facts["took"] = _duration(said[-1].time - starts[0].time)
        if len(starts) > 1:
            facts["started again"] = f"{len(starts) - 1} ×"
    rates = [event.samples_per_s for event in said if isinstance(event, events.Steps) and event.samples_per_s]
    if rates:
        facts["speed"] = f"{sorted(rates)[len(rates) // 2]:,.0f} samples/s"
    return facts


def _charts(history: pd.DataFrame, gradients: pd.DataFrame, communication: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """(heading, SVG) of each chart that has something to show."""
    if history.empty:
        return
    steps = history["step"].tolist()
    evaluated = history.drop(columns=["step", "epoch", "lr", "samples_per_s", "loss"])
    curves = [Curve("training", steps, history["loss"].tolist())]
    if "val_loss" in evaluated:
        curves.append(_known("held out", history, "val_loss"))
    yield "Loss", chart(curves)
    for name in evaluated.columns:
        if name != "val_loss" and evaluated[name].notna().any():
            yield name.replace("_", " ").capitalize(), chart([_known(name, history, name)])
    if not gradients.empty:
        by_step = gradients.groupby("step")["norm"]
        bands = {"largest": by_step.max(), "median": by_step.median(), "smallest": by_step.min()}
        curves = [Curve(name, band.index.tolist(), band.tolist()) for name, band in bands.items()]
        yield "Gradient norms over the layers", chart(curves, log=True)
    if not communication.empty and communication["rank"].nunique() > 1:
        known = communication[communication["busy"].notna()]
        share = 100 * known["exposed"] / (known["busy"] + known["exposed"])
        by_rank = [(f"rank {rank}", share[known["rank"] == rank]) for rank in sorted(known["rank"].unique())]
        curves = [Curve(name, known["step"][part.index].tolist(), part.tolist()) for name, part in by_rank[:4]]
        yield "Waits for other ranks, per cent of a step", chart(curves)
    yield "Learning rate", chart([Curve("learning rate", steps, history["lr"].tolist())])


def _known(name: str, history: pd.DataFrame, column: str) -> Curve:
    rows = history[history[column].notna()]
    return Curve(name, rows["step"].tolist(), rows[column].tolist())


def _settings(config: Any) -> list[tuple[str, Any, bool]]:
    """(dotted name, value, whether it was changed), the changed ones first."""
    changed = config.changes_from(type(config)())
    everything = {**{name: config.flat().get(name) for name in changed}, **config.flat()}
    return [(name, value, name in changed) for name, value in everything.items()]


def _environment(run: Run) -> dict[str, Any]:
    path = run.path / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Nested facts by one name each; lists as text."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= value
        else:
            flat[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return {name: value for name, value in flat.items() if value not in (None, "")}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# -- charts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One curve: x, and y of the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def chart(curves: Sequence[Curve], *, log: bool = False) -> str:
    """Curves over steps as SVG, coloured by the page's classes ``c0`` …; on a logarithmic scale only what is above 0."""
    drawable = [[(x, _log(y) if log else y) for x, y in thinned(c)] for c in curves]
    points = [point for part in drawable for point in part if math.isfinite(point[1])]
    names = ", ".join(escape(curve.name) for curve in curves)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{names} by step">'
    if not points:
        return f'{head}<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no finite values</text></svg>'
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    low_y, high_y = min(p[1] for p in points), max(p[1] for p in points)
    margin = 0.05 * (high_y - low_y) or 0.05 * abs(high_y) or 1.0
    low_y, high_y = low_y - margin, high_y + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x or 1)
        up = (y - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [head]
    for tick in ticks(low_y, high_y):
        _, y = place(low_x, tick)
        label = f"{10**tick:.1e}" if log else f"{tick:.4g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks(low_x, high_x):
        x, _ = place(tick, low_y)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.6g}</text>')
    for number, (curve, drawn) in enumerate(zip(curves, drawable, strict=True)):
        path = _path(drawn, place)
        parts.append(f'<path class="curve c{number}" d="{path}"><title>{escape(curve.name)}</title></path>')
    return "".join([*parts, "</svg>", _legend(curves)])


def _log(y: float) -> float:
    return math.log10(y) if y > 0 and math.isfinite(y) else math.nan


def thinned(curve: Curve) -> list[tuple[float, float]]:
    """At most about :data:`POINTS` points: of each stretch the lowest and the highest, in order; non-finite ones stay."""
    points = list(zip(curve.x, curve.y, strict=True))
    if len(points) <= POINTS:
        return points
    size = math.ceil(2 * len(points) / POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        chosen = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        broken = [point for point in stretch if not math.isfinite(point[1])][:1]
        kept += sorted([*chosen, *broken], key=lambda p: p[0])
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _path(points: list[tuple[float, float]], place: Any) -> str:
    """SVG path through the finite points; anew after each gap. A lone point becomes a dot by the round line end."""
    path, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            path.append("{}{:.1f} {:.1f}".format(pen, *place(x, y)))
            if pen == "M":
                path.append("h0")
            pen = "L"
        else:
            pen = "M"
    return "".join(path)


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    entries = (f'<span class="c{number}">{escape(curve.name)}</span>' for number, curve in enumerate(curves))
    return f'<p class="legend">{"".join(entries)}</p>'
