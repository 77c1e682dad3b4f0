"""A recording as plotly figures for code, and as a small static drawing for notebooks that are files.

* :func:`plotly_figures` — by name, of what has readings;
* :func:`static_html` — a few tens of kilobytes of HTML and SVG, without scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets import svg
from widgets.inspector.memory import plotly_layers, plotly_memory, static_memory
from widgets.inspector.quantities import QUANTITIES
from widgets.inspector.recording import FIELDS, TIMES, Recording

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MARKS = {"error": "✕", "warning": "▲", "info": "•"}
Findings = Sequence[tuple[str, str, str]]


def log_norms(recording: Recording) -> np.ndarray:
    """log10 of gradient norms, shape (columns, layers); NaN where there is none, zero or not finite."""
    assert recording.gradients is not None
    return _logs(recording.gradients.values)


def _logs(values: np.ndarray) -> np.ndarray:
    good = np.isfinite(values) & (values > 0)
    return np.where(good, np.log10(np.where(good, values, 1.0).astype("f8")), np.nan)


def bin_labels(edges: Sequence[float]) -> list[str]:
    """The middle of each bin; ``0`` for the one about zero."""
    return ["0" if a < 0 < b else f"{(a + b) / 2:.3g}" for a, b in zip(edges, edges[1:], strict=False)]


def plotly_figures(recording: Recording) -> dict[str, go.Figure]:
    """Figures of the loss and metrics, gradients' norms and other quantities, distributions of activations, memory, throughput
    and where a step's time goes."""
    import plotly.graph_objects as go

    figures: dict[str, go.Figure] = {}
    curves = {n: line.arrays() for n, line in recording.lines.items() if len(line)}
    loss = {n: xy for n, xy in curves.items() if n == "loss" or n.startswith("metric:")}
    if loss:
        figures["loss"] = figure = go.Figure()
        for name, (x, y) in loss.items():
            mode = "lines+markers" if name.startswith("metric:") else "lines"
            figure.add_scatter(x=x, y=y, name=_label(name), mode=mode, yaxis="y2" if _on_the_right(name) else "y")
        right = {"overlaying": "y", "side": "right", "showgrid": False}
        figure.update_layout(xaxis_title="step", yaxis_title="loss", yaxis2=right)
    if recording.gradients is not None:
        z = log_norms(recording).T
        bar = {"title": "log₁₀ norm"}
        heat = go.Heatmap(x=recording.gradients.x, y=recording.layers("gradients"), z=z, colorscale="Viridis", colorbar=bar)
        figures["gradients"] = go.Figure(heat).update_layout(xaxis_title="step", yaxis_autorange="reversed")
    for quantity in QUANTITIES[1:]:
        if (grid := recording.others.get(quantity.name)) is not None:
            z = (_logs(grid.values) if quantity.log else grid.values).T
            bar = {"title": f"log₁₀ {quantity.label.lower()}" if quantity.log else quantity.label}
            heat = go.Heatmap(x=grid.x, y=recording.layers("gradients"), z=z, colorscale="Viridis", colorbar=bar)
            figures[f"gradients:{quantity.name}"] = go.Figure(heat).update_layout(xaxis_title="step", yaxis_autorange="reversed")
    if recording.activations is not None:
        shown = recording.distributions()
        rows = recording.layers("activations")
        heat = go.Heatmap(x=bin_labels(shown.edges), y=rows, z=shown.levels, colorscale="Viridis", showscale=False)
        xaxis = {"title": f"value, at step {shown.step}", "type": "category"}
        figures["activations"] = go.Figure(heat).update_layout(xaxis=xaxis, yaxis_autorange="reversed")
    memory = {n: xy for n, xy in curves.items() if n.startswith("memory:")}
    if memory:
        figures["memory"] = plotly_memory(memory, recording.holding)
    if recording.holding.layers:
        figures["memory_layers"] = plotly_layers(recording.holding)
    if "rate" in curves:
        figures["throughput"] = figure = go.Figure().add_scatter(x=curves["rate"][0], y=curves["rate"][1], mode="lines")
        figure.update_layout(xaxis_title="step", yaxis_title="samples/s", yaxis_rangemode="tozero")
    times = {n: xy for n, xy in curves.items() if n.startswith("time:")}
    if times:
        figures["communication"] = figure = go.Figure()
        for name, (x, y) in times.items():
            _, rank, field = name.split(":")
            figure.add_scatter(x=x, y=1000 * y, name=f"rank {rank} {field}", mode="lines")
        figure.update_layout(xaxis_title="step", yaxis_title="ms", yaxis_rangemode="tozero")
    for name, figure in figures.items():
        figure.update_layout(template="plotly_white", height=360, margin={"t": 40}, title=f"{recording.run.id}: {name}")
    return figures


def static_html(recording: Recording, header: Mapping[str, Any], findings: Findings) -> str:
    """The run as it is now: header, findings, curves and heat maps. No scripts, at most about 60 kB."""
    quiet = "color:var(--jp-ui-font-color2,#777)"
    facts = [f"step {header['step']:,} of {header['total']:,}", f"epoch {header['epoch']}", header["facts"]]
    parts = [
        f'<p style="margin:0 0 2px"><strong>{escape(header["name"])}</strong> — {escape(header["status"])}</p>',
        f'<p style="margin:0 0 8px;{quiet}">{escape(" · ".join(filter(None, facts)))}</p>',
    ]
    for severity, message, remedy in findings[:8]:
        tried = f' <span style="{quiet}">Try <code>{escape(remedy)}</code></span>' if remedy else ""
        parts.append(f'<p style="margin:0 0 4px">{_MARKS[severity]} {escape(message)}{tried}</p>')
    loss = {}
    for name, line in recording.lines.items():
        if name == "loss" or name.startswith("metric:"):
            loss[_label(name)] = (*line.arrays(), 2 if _on_the_right(name) else 1)
    parts.append(_section("Loss and metrics", svg.chart(loss)))
    if recording.gradients is not None:
        norms = log_norms(recording)
        drawn = svg.heat_map(recording.layers("gradients"), recording.gradients.x, norms, title="log₁₀ of the norm")
        parts.append(_section("Gradient norms by layer", drawn))
    if recording.activations is not None:
        shown = recording.distributions()
        rows, labels = recording.layers("activations"), bin_labels(shown.edges)
        title = f"share of values, step {shown.step}"
        drawn = svg.heat_map(
            rows, np.arange(len(labels)), shown.levels.T, title=title, x_title="value", ticks=labels, pool_rows=False
        )
        parts.append(_section("Activations by layer", drawn))
    memory = {}
    several = recording.world_size > 1
    for name, line in recording.lines.items():
        if name.startswith("memory:"):
            _, rank, field = name.split(":")
            x, y = line.arrays()
            if field == FIELDS[0] or not several and field == "peak":
                memory[f"rank {rank}, GB" if several else f"{field}, GB"] = (x, y / 1e9, 1)
    if memory:
        parts.append(_section("Memory", svg.chart(memory, height=140, from_zero=True) + static_memory(recording.holding)))
    if several and (ranks := recording.times()["ranks"]):
        lines = {f"rank {rank}, ms": recording.lines[f"time:{rank}:{TIMES[0]}"].arrays() for rank in ranks}
        lines["whole step, ms"] = recording.lines[f"time:{ranks[0]}:{TIMES[2]}"].arrays()
        drawn = svg.chart({name: (x, 1000 * y, 1) for name, (x, y) in lines.items()}, height=140, from_zero=True)
        parts.append(_section("Each rank's own work in a step", drawn))
    style = "font-family:var(--jp-ui-font-family,sans-serif);font-size:13px;color:var(--jp-ui-font-color1,inherit)"
    return f'<div style="{style}">{"".join(parts)}</div>'


def empty_html() -> str:
    return svg.note("The Inspector has no run open: inspector.open(run) shows one.")


def _section(title: str, content: str) -> str:
    style = "margin:12px 0 4px;font-size:12px;font-weight:600;color:var(--jp-ui-font-color2,#777)"
    return f'<p style="{style}">{escape(title)}</p>{content}'


def _label(name: str) -> str:
    return "held-out loss" if name in ("metric:loss", "metric:val_loss") else name.removeprefix("metric:")


def _on_the_right(name: str) -> bool:
    """Metrics other than losses have the right axis."""
    return name.startswith("metric:") and "loss" not in name
