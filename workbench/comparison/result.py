"""What a comparison found, and how it looks: as text, in a notebook, as a figure, as a page that needs nothing else.

Names come from outside and are escaped everywhere.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.storage import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_HEADINGS = (
    "variant",
    "form",
    "accuracy",
    "95 % interval",
    "parameters",
    "file",
    "ms at 1",
    "p95",
    "ms at {batch}",
    "p95",
    "agrees",
    "KL",
    "size",
    "speed",
)
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
_SYMBOLS = {"eager fp32": "circle-open", "compiled fp32": "circle", "compiled bf16": "diamond", "compiled int8": "square"}
_STYLE = """
.wb-comparison{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff}
.wb-comparison table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.wb-comparison th{font-weight:500;color:#666;border-bottom:1px solid #ccc}
.wb-comparison th,.wb-comparison td{padding:.25em .8em;text-align:right;white-space:nowrap}
.wb-comparison th:nth-child(-n+2),.wb-comparison td:nth-child(-n+2){text-align:left}
.wb-comparison tr:hover td{background:#f5f5f5}
.wb-comparison .warn{border-left:3px solid #cc8800;padding:.1em .8em;margin:.6em 0;max-width:60em}
.wb-comparison .note{color:#666;max-width:60em}
"""


@dataclass(frozen=True)
class Measurement:
    """One variant in one form. Ratios are to the first variant in the like form: above 1 is smaller or faster."""

    variant: str
    form: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    parameters: int
    file_bytes: int
    latency_p50_ms: float
    latency_p95_ms: float
    batch_p50_ms: float
    batch_p95_ms: float
    agreement: float
    kl: float
    size_ratio: float
    speed_ratio: float
    batch_speed_ratio: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: ``frame()``, ``warnings``, ``figure()``, ``to_html(path)``; shows itself in a notebook."""

    measurements: list[Measurement]
    warnings: list[str]
    conditions: dict[str, Any] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """One row a variant and form; latencies in milliseconds, sizes in bytes, divergence in nats."""
        import pandas as pd

        return pd.DataFrame([asdict(measurement) for measurement in self.measurements])

    def figure(self) -> go.Figure:
        """Accuracy, with its interval, against latency at batch 1 and against file size."""
        return _figure(self)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page that needs nothing else; written to ``path`` too when given."""
        return _page(self, path)

    def _repr_html_(self) -> str:
        return _fragment(self)

    def __str__(self) -> str:
        return _text(self)


def _text(comparison: Comparison) -> str:
    """The table in aligned columns, the conditions, the warnings."""
    rows = [_headings(comparison), *map(_cells, comparison.measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    lines.insert(1, "─" * max(map(len, lines)))
    return "\n".join([*lines, _note(comparison), *(f"! {warning}" for warning in comparison.warnings)])


def _fragment(comparison: Comparison) -> str:
    """The table and the warnings as HTML, for a notebook's output cell."""
    head = "".join(f"<th>{escape(name)}</th>" for name in _headings(comparison))
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in _cells(m)) + "</tr>" for m in comparison.measurements)
    warnings = "".join(f'<p class="warn">{escape(warning)}</p>' for warning in comparison.warnings)
    return (
        f'<div class="wb-comparison"><style>{_STYLE}</style><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'<p class="note">{escape(_note(comparison))}</p>{warnings}</div>'
    )


def _page(comparison: Comparison, path: str | os.PathLike[str] | None = None) -> str:
    """One HTML file with the figure's script inside (5 MB); no network is needed to read it."""
    drawn = _figure(comparison).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Comparison</title><style>body{margin:2em auto;max-width:90em;padding:0 1em;overflow-x:auto}</style></head>"
        f"<body>{_fragment(comparison)}{drawn}</body></html>"
    )
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), html)
    return html


def _figure(comparison: Comparison) -> go.Figure:
    """Accuracy, with its interval, against latency at batch 1 and against file size; one colour a variant, one mark a form."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    drawn = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    colours = {
        name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(m.variant for m in comparison.measurements))
    }
    sized: set[str] = set()
    for m in comparison.measurements:
        name = f"{escape(m.variant)}, {m.form}"
        places = [(1, m.latency_p50_ms)]
        if m.variant not in sized:  # a variant's forms are one file
            sized.add(m.variant)
            places.append((2, m.file_bytes / 1e6))
        for column, value in places:
            drawn.add_trace(
                go.Scatter(
                    x=[value],
                    y=[100 * m.accuracy],
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": [100 * (m.accuracy_high - m.accuracy)],
                        "arrayminus": [100 * (m.accuracy - m.accuracy_low)],
                        "thickness": 1,
                    },
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    mode="markers",
                    marker={"color": colours[m.variant], "size": 10, "symbol": _SYMBOLS.get(m.form, "x")},
                    hovertemplate=f"{name}<br>%{{x:.3g}}<br>%{{y:.2f}} %<extra></extra>",
                ),
                row=1,
                col=column,
            )
    drawn.update_xaxes(title_text="latency at batch 1 (ms, median)", rangemode="tozero", row=1, col=1)
    drawn.update_xaxes(title_text="file (MB)", rangemode="tozero", row=1, col=2)
    drawn.update_yaxes(title_text="accuracy (%, 95 % interval)", row=1, col=1)
    return drawn.update_layout(template="plotly_white", height=420, margin={"t": 30, "r": 10, "l": 60, "b": 50})


def _headings(comparison: Comparison) -> list[str]:
    return [heading.format(batch=comparison.conditions.get("batch", "n")) for heading in _HEADINGS]


def _cells(m: Measurement) -> list[str]:
    return [
        m.variant,
        m.form,
        f"{m.accuracy:.2%}",
        f"{m.accuracy_low:.1%} – {m.accuracy_high:.1%}",
        f"{m.parameters:,}",
        _bytes(m.file_bytes),
        f"{m.latency_p50_ms:.2f}",
        f"{m.latency_p95_ms:.2f}",
        f"{m.batch_p50_ms:.2f}",
        f"{m.batch_p95_ms:.2f}",
        f"{m.agreement:.2%}",
        f"{m.kl:.1e}",
        f"÷ {m.size_ratio:.2f}",
        f"× {m.speed_ratio:.2f}",
    ]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _note(comparison: Comparison) -> str:
    c = {"cpu": "CPU", "samples": 0, "threads": "?", "torch": "?", "rounds": "?", **comparison.conditions}
    return (
        f"{c['samples']:,} samples; {c['cpu']}, {c['threads']} thread(s), PyTorch {c['torch']}; medians of {c['rounds']} calls, "
        "taken in turns. Size and speed (at batch 1) are against the first variant, in the like form."
    )
