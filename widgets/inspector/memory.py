"""What holds a rank's memory, for the Inspector: bytes by holder over time, by layer, and both as figures.

* :class:`Holding` — of one rank, bounded; nothing for runs whose readings tell no holders;
* :func:`plotly_memory`, :func:`static_memory` — the memory of all ranks, and what holds one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets import svg
from widgets.frames import Columns

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import pyarrow as pa

STAYING = ("parameters", "optimizer", "buffers", "average", "exchange", "teacher", "data")
"""Holders of the same bytes at both moments."""
MOMENTS = {
    "forward": {"accumulated": "gradients", "activations": "activations", "rest": "other"},
    "backward": {"gradients": "gradients", "other": "other"},
}
"""By moment, the end of the forward pass or of the backward pass, the further rows of the stack and what they hold."""
ROWS = (*STAYING, *(row for rows in MOMENTS.values() for row in rows))
LAYER_HOLDERS = ("parameters", "gradients", "optimizer", "activations")
SHOWN = 12
"""Layers shown by themselves."""
COLOURS = {
    "parameters": "#4b7fe0",
    "optimizer": "#8a66cc",
    "buffers": "#5aa7c7",
    "average": "#b08a5a",
    "exchange": "#c76aa5",
    "teacher": "#7d6a58",
    "data": "#7fa83c",
    "gradients": "#d98a1f",
    "activations": "#2a9d82",
    "other": "#8d959e",
}
WORDS = {
    "optimizer": "optimizer state",
    "average": "average of weights",
    "exchange": "exchange of gradients",
    "data": "samples",
}


class Holding:
    """What holds one rank's memory.

    Attributes:
        stack: bytes of :data:`ROWS` by step read; None before the first reading that tells.
        layers: by layer, bytes of :data:`LAYER_HOLDERS`, NaN where they are not known.
        process: whether the rest is a whole process, on a CPU, and so says little of the run.
        fragmentation: share of the reserved memory that is free in pieces, at the last reading; NaN where it is not known.
    """

    def __init__(self) -> None:
        self.stack: Columns | None = None
        self.layers: dict[str, list[float]] = {}
        self.process = False
        self.fragmentation = float("nan")

    def take(self, table: pa.Table) -> bool:
        """Take readings of the kind ``memory``; False where they tell no holders: an earlier version wrote them."""
        if "parameters" not in table.column_names:
            return False
        held = {name: np.asarray(table[name].to_numpy(zero_copy_only=False), dtype="f8") for name in table.column_names}
        staying = sum(held[name] for name in STAYING)
        held["rest"] = held["forward"] - staying - held["accumulated"] - held["activations"]
        self.stack = self.stack if self.stack is not None else Columns(len(ROWS), 500)
        for index, step in enumerate(held["step"]):
            self.stack.append(float(step), np.array([held[name][index] for name in ROWS]))
        self.fragmentation = float(held["fragmentation"][-1])
        self.process = bool(np.isnan(self.fragmentation))
        return True

    def take_layers(self, table: pa.Table) -> None:
        """Take a reading of the kind ``memory_layers``; the last one counts."""
        steps = np.asarray(table["step"])
        last = table.filter(steps == steps[-1])
        columns = [last[name].to_numpy(zero_copy_only=False).astype("f8") for name in LAYER_HOLDERS]
        self.layers = dict(zip(last["layer"].to_pylist(), np.column_stack(columns).tolist(), strict=True))

    @property
    def moment(self) -> str:
        """The fuller moment of a step: ``forward`` while activations are more than gradients, else ``backward``."""
        if self.stack is None or not len(self.stack):
            return "backward"
        last = dict(zip(ROWS, self.stack.values[-1].tolist(), strict=True))
        return "forward" if last["accumulated"] + last["activations"] > last["gradients"] else "backward"

    def curves(self) -> Iterator[tuple[str, np.ndarray]]:
        """(holder, bytes by column) at :attr:`moment`, from the bottom of the stack; without a process's rest."""
        assert self.stack is not None
        for row, holder in [*((name, name) for name in STAYING), *MOMENTS[self.moment].items()]:
            values = np.maximum(np.nan_to_num(self.stack.values[:, ROWS.index(row)].astype("f8")), 0)
            if values.any() and not (self.process and holder == "other"):
                yield holder, values

    def largest(self) -> list[tuple[str, list[float]]]:
        """The layers that hold most, and what all others hold together."""

        def whole(entry: tuple[str, list[float]]) -> float:
            return float(np.nansum(entry[1]))

        ordered = sorted(self.layers.items(), key=whole, reverse=True)
        others = ordered[SHOWN:]
        if not others:
            return ordered
        return [*ordered[:SHOWN], (f"{len(others)} other layers", np.nansum([held for _, held in others], axis=0).tolist())]

    def fact(self) -> dict[str, Any]:
        """What the page is told beside the stack."""
        layers = [{"layer": name, "held": [None if v != v else v for v in held]} for name, held in self.largest()]
        pieces = None if self.fragmentation != self.fragmentation else round(self.fragmentation, 4)
        return {"moment": self.moment, "process": self.process, "fragmentation": pieces, "layers": layers}


def plotly_memory(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], holding: Holding) -> go.Figure:
    """Bytes by step: each rank's curves, over what holds the rank that is shown."""
    import plotly.graph_objects as go

    figure = go.Figure()
    if holding.stack is not None:
        for holder, values in holding.curves():
            figure.add_scatter(
                x=holding.stack.x,
                y=values,
                name=WORDS.get(holder, holder),
                mode="lines",
                stackgroup="holders",
                line={"width": 0, "color": COLOURS[holder]},
                fillcolor=COLOURS[holder],
            )
    for name, (x, y) in curves.items():
        _, rank, field = name.split(":")
        figure.add_scatter(x=x, y=y, name=f"rank {rank} {field}", mode="lines")
    return figure.update_layout(xaxis_title="step", yaxis_title="bytes", yaxis_rangemode="tozero")


def plotly_layers(holding: Holding) -> go.Figure:
    """A bar a layer, those that hold most first."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = holding.largest()
    for index, holder in enumerate(LAYER_HOLDERS):
        values = [max(0.0, held[index]) if held[index] == held[index] else 0.0 for _, held in rows]
        names = [name for name, _ in rows]
        figure.add_bar(y=names, x=values, orientation="h", name=WORDS.get(holder, holder), marker_color=COLOURS[holder])
    return figure.update_layout(barmode="stack", xaxis_title="bytes", yaxis_autorange="reversed")


def static_memory(holding: Holding) -> str:
    """Bars as SVG: the holders at the last reading, then the layers that hold most; nothing where they are not known."""
    if holding.stack is None:
        return ""
    last = {holder: float(values[-1]) for holder, values in holding.curves()}
    parts = _bars([("", last)], height=16)
    rows = [(name, dict(zip(LAYER_HOLDERS, held, strict=True))) for name, held in holding.largest()]
    return parts + (_bars(rows, height=12) if rows else "")


def _bars(rows: list[tuple[str, dict[str, float]]], height: int) -> str:
    cleaned = [(name, {holder: v for holder, v in held.items() if v == v and v > 0}) for name, held in rows]
    most = max((sum(held.values()) for _, held in cleaned), default=0) or 1
    named, legend = any(name for name, _ in rows), not any(name for name, _ in rows)
    left = 190 if named else 0
    parts, y = [], 0
    for name, held in cleaned:
        x = float(left)
        for holder, value in held.items():
            wide = (svg.WIDTH - left - 64) * value / most
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{height - 2}" fill="{COLOURS[holder]}"/>')
            x += wide
        shown = name if len(name) <= 30 else "…" + name[-29:]
        style = 'font-family="var(--jp-ui-font-family,sans-serif)" font-size="11" fill="var(--jp-ui-font-color2,#777)"'
        if shown:
            parts.append(f'<text x="{left - 6}" y="{y + height - 4}" text-anchor="end" {style}>{escape(shown)}</text>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y + height - 4}" {style}>{size_text(sum(held.values()))}</text>')
        y += height
        if legend:
            at = 0.0
            for holder, value in held.items():
                text = f"{WORDS.get(holder, holder)} {size_text(value)}"
                if at and at + 20 + 6.2 * len(text) > svg.WIDTH:
                    at, y = 0.0, y + 16
                parts.append(f'<circle cx="{at + 4:.0f}" cy="{y + 10}" r="4" fill="{COLOURS[holder]}"/>')
                parts.append(f'<text x="{at + 12:.0f}" y="{y + 14}" {style}>{escape(text)}</text>')
                at += 26 + 6.2 * len(text)
            y += 22
    size = f'viewBox="0 0 {svg.WIDTH} {y}" style="width:100%;max-width:{svg.WIDTH}px;height:auto;display:block"'
    label = "What holds the memory" if legend else "What each layer holds"
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" {size}>{"".join(parts)}</svg>'


def size_text(size: float) -> str:
    """Bytes in a unit that a person reads: ``1.09 MB``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
