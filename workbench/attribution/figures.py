"""Explained samples in plotly, to zoom and point at: the same drawings as in HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.attribution.drawing import CHANNELS, COLUMNS, caption, scale_of
from workbench.attribution.pictures import AGAINST, FOR

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.attribution.explanation import Explanation

_FOR, _AGAINST = (f"rgb({','.join(map(str, colour))})" for colour in (FOR, AGAINST))
SCALE = [[0.0, _AGAINST], [0.5, "rgba(128,128,128,0.08)"], [1.0, _FOR]]
"""Diverging, clear at zero."""


def figure(e: Explanation) -> go.Figure:
    """One sample: an image's credits as a heat map over it, a text's and a table's as bars, a series' as a heat map and lines."""

    drawn: go.Figure = {"image": _image, "text": _text, "table": _table, "series": _series}[e.kind](e)
    title, facts = caption(e)
    text = f"{title}<br><sup>{facts}</sup>" if facts else title
    return drawn.update_layout(
        template="plotly_white", title={"text": text, "font": {"size": 14}}, margin={"t": 60, "r": 10, "l": 60, "b": 50}
    )


def _image(e: Explanation) -> go.Figure:
    import plotly.graph_objects as go

    parts, x = e.parts, e.x.detach().float().cpu().mean(0)
    most = scale_of(parts)
    beneath = go.Heatmap(z=x.numpy(), colorscale="Greys_r", showscale=False, hoverinfo="skip", opacity=0.5)
    credits = go.Heatmap(z=parts.numpy(), **_diverging(most), opacity=0.7, hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>")
    drawn = go.Figure([beneath, credits])
    drawn.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain")
    drawn.update_xaxes(constrain="domain")
    return drawn.update_layout(height=420, width=480)


def _text(e: Explanation) -> go.Figure:
    shown = [(e.names.token(i), credit) for i, credit in zip(e.x.tolist(), e.parts.tolist(), strict=True) if e.names.token(i)]
    return _bars([word for word, _ in shown], [credit for _, credit in shown], "")


def _table(e: Explanation) -> go.Figure:
    frame = e.table().head(COLUMNS)
    labels = [f"{name} = {value:.4g}" for name, value in zip(frame.column, frame.value, strict=True)]
    return _bars(labels, frame.credit.tolist(), "")


def _bars(labels: list[str], credits: list[float], title: str) -> go.Figure:
    from html import escape

    import plotly.graph_objects as go

    places = list(range(len(labels)))
    colours = [_FOR if credit > 0 else _AGAINST for credit in credits]
    bars = go.Bar(x=credits, y=places, orientation="h", marker={"color": colours}, hovertemplate="%{x:.3g}<extra></extra>")
    drawn = go.Figure(bars)
    drawn.update_yaxes(autorange="reversed", tickvals=places, ticktext=[escape(label) for label in labels], title_text=title)
    drawn.update_xaxes(title_text="credit", zeroline=True)
    return drawn.update_layout(height=120 + 22 * len(labels))


def _series(e: Explanation) -> go.Figure:
    from html import escape

    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    parts, x = e.parts, e.x.detach().cpu()
    most = scale_of(parts)
    order = parts.abs().sum(0).argsort(descending=True, stable=True)[:CHANNELS].tolist()
    drawn = make_subplots(rows=len(order), shared_xaxes=True, vertical_spacing=0.04)
    for row, i in enumerate(order, start=1):
        low, high = float(x[:, i].min()), float(x[:, i].max())
        middle, tall = (low + high) / 2, 1.1 * ((high - low) or 1.0)
        ground = go.Heatmap(
            z=parts[:, i][None].numpy(), y=[middle], dy=tall, **_diverging(most), showlegend=False, opacity=0.6, hoverinfo="skip"
        )
        ground.showscale = row == 1
        line = go.Scatter(
            y=x[:, i].numpy(), line={"color": "#555", "width": 1.5}, name=escape(e.names.column(i)), showlegend=False
        )
        drawn.add_trace(ground, row=row, col=1)
        drawn.add_trace(line, row=row, col=1)
        drawn.update_yaxes(title_text=escape(e.names.column(i)), range=[middle - tall / 2, middle + tall / 2], row=row, col=1)
    drawn.update_xaxes(title_text="step", row=len(order), col=1)
    return drawn.update_layout(height=120 + 140 * len(order))


def _diverging(most: float) -> dict[str, Any]:
    return {
        "colorscale": SCALE,
        "zmin": -most,
        "zmax": most,
        "zmid": 0,
        "colorbar": {"title": {"text": "credit"}, "thickness": 12},
    }
