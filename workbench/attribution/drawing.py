"""Explained samples as HTML, as their readers expect them, without scripts: CSS and SVG, and small PNGs for images.

* :func:`fragment` — within a notebook's output or a panel, in JupyterLab's colours; :func:`page` — a file of its own.
* images: the image, and beside it the credits over the grey image; texts: words on coloured grounds; tables: signed bars of the
  columns with the largest credits; series: lines on coloured grounds.

Colours are on a scale symmetric about zero. Names come from outside: the template ``explanation.html.j2`` escapes everything that
isn't drawn here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.attribution.pictures import heat_over, picture

if TYPE_CHECKING:
    from workbench.attribution.explanation import Explanation

SMALL = 64
"""Pixels of the longer side up to which an image's pixels are drawn as squares; larger images are drawn smoothly."""
PIXELS = 448
"""Longer side of an image in a file, at most."""
COLUMNS = 12
"""Columns of a table that are drawn: those with the largest credits."""
CHANNELS = 4
"""Channels of a series that are drawn: those with the largest credits."""
WIDTH, LANE, GAP = 640, 72, 22
"""Of a series' drawing, in CSS pixels: its width, the height of a channel and of the line above it."""
BINS = 160
"""Steps of a series that are coloured apart, at most."""


def fragment(explanations: Sequence[Explanation]) -> str:
    """Explained samples within a notebook's output or a panel."""
    return _render(explanations, whole=False, title="")


def page(explanations: Sequence[Explanation], title: str) -> str:
    """One HTML file: no script, no request, light or dark as the reader's system is."""
    return _render(explanations, whole=True, title=title)


def caption(e: Explanation) -> tuple[str, str]:
    """What the model makes of a sample, in words: in short, and in numbers."""
    name = e.names.label
    if e.prediction is None:
        return f"for {name(e.target)}", ""
    if e.label is None:
        title, facts = name(e.prediction), [f"probability {_percent(e.probability)}"]
    elif e.label == e.prediction:
        title, facts = f"{name(e.label)}, rightly", [f"probability {_percent(e.probability)}"]
    else:
        title = f"{name(e.label)}, taken for {name(e.prediction)}"
        facts = [f"{name(e.prediction)} {_percent(e.probability)}", f"{name(e.label)} {_percent(e.label_probability)}"]
    if e.loss is not None:
        facts.append(f"loss {e.loss:.2f}")
    return title, " · ".join(facts)


def scale_of(values: Tensor) -> float:
    """The absolute credit that has the full colour: the largest, but of many values the 99th percentile, beyond which few lie."""
    sizes = values.abs().flatten()
    most = float(sizes.max()) if len(sizes) else 0.0
    if len(sizes) <= 400:
        return most
    return float(sizes.kthvalue(round(0.99 * len(sizes))).values) or most


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    percent = 100 * share
    return f"{percent:.1f} %" if 0.05 <= percent <= 99.95 else "< 0.1 %" if percent < 50 else "> 99.9 %"


def number(value: float) -> str:
    """Three significant digits, a minus sign as long as the plus."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


# One sample -------------------------------------------------------------------------------------------------------------


def _tile(e: Explanation) -> dict[str, Any]:
    title, facts = caption(e)
    parts = e.parts
    most = scale_of(parts)
    more = []
    if e.prediction is not None and e.target != e.prediction:
        more.append(f"explained for {e.names.label(e.target)}")
    if e.sample is not None:
        more.append(f"sample {e.sample}")
    return {
        "kind": e.kind,
        "title": title,
        "facts": facts,
        "wrong": e.label is not None and e.label != e.prediction,
        "more": " · ".join(more),
        "scale": f"{most:.2g}",
        "bounded": most < float(parts.abs().max()) if parts.numel() else False,
        "target": e.names.label(e.target),
        **_DRAWINGS[e.kind](e, parts, most),
    }


def _image(e: Explanation, parts: Tensor, most: float) -> dict[str, Any]:
    x = e.x.detach().float().cpu()
    height, width = x.shape[-2:]
    shrink = max(height, width) / PIXELS
    if shrink > 1:
        size = (round(height / shrink), round(width / shrink))
        x, parts = (torch.nn.functional.interpolate(t[None], size, mode="area")[0] for t in (x, parts[None].float()))
        parts = parts[0]
    return {
        "plain": picture(x),
        "heat": heat_over(x, parts, most),
        "pixelated": max(height, width) <= SMALL,
        "ratio": f"{width} / {height}",
    }


def _text(e: Explanation, parts: Tensor, most: float) -> dict[str, Any]:
    """Words, with a space before each that doesn't go on with the one before (##ing); padding, which has no text, is left out."""
    words = []
    for index, credit in zip(e.x.tolist(), parts.tolist(), strict=True):
        token = e.names.token(index)
        if not token:
            continue
        joined, word = token.startswith("##"), token.removeprefix("##")
        share = min(abs(credit) / most, 1.0) if most else 0.0
        side = "for" if credit > 0 else "against"
        words.append({"text": word, "joined": joined, "side": side, "share": f"{share:.2f}", "credit": number(credit)})
    return {"words": words}


def _table(e: Explanation, parts: Tensor, most: float) -> dict[str, Any]:
    most = float(parts.abs().max()) if parts.numel() else 0.0  # lengths tell more apart than colours: none is cut
    frame = e.table()
    shown = frame.head(COLUMNS)
    bars = [
        {
            "name": name,
            "value": f"{value:.4g}".replace("-", "−"),
            "credit": number(credit),
            "side": "for" if credit > 0 else "against",
            "share": f"{50 * abs(credit) / most:.1f}" if most else "0",
        }
        for name, value, credit in zip(shown.column, shown.value.tolist(), shown.credit.tolist(), strict=True)
    ]
    left = frame.credit[COLUMNS:]
    rest = f"{len(left)} other column{'s' if len(left) != 1 else ''}: {number(float(left.sum()))} in all" if len(left) else ""
    return {"bars": bars, "rest": rest, "scale": f"{most:.2g}", "bounded": False}


def _series(e: Explanation, parts: Tensor, most: float) -> dict[str, Any]:
    from markupsafe import Markup

    x = e.x.detach().double().cpu()
    order = parts.abs().sum(0).argsort(descending=True, stable=True)[:CHANNELS].tolist()
    lanes = [_lane(x[:, i], parts[:, i], most, GAP + row * (LANE + GAP), e.names.column(i)) for row, i in enumerate(order)]
    height = len(order) * (LANE + GAP) + 20
    ends = f'<text x="0" y="{height - 6}">0</text><text x="{WIDTH}" y="{height - 6}" text-anchor="end">{len(x) - 1} steps</text>'
    left = x.shape[1] - len(order)
    rest = (
        f"{left} other channel{'s' if left != 1 else ''}: {number(float(parts.sum() - parts[:, order].sum()))} in all"
        if left
        else ""
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="series">{"".join(lanes)}{ends}</svg>'
    return {"svg": Markup(svg), "rest": rest}


def _lane(x: Tensor, credits: Tensor, most: float, top: float, name: str) -> str:
    """One channel: its line, on the mean credit of each bin of steps."""
    steps = len(x)
    low, high = float(x.min()), float(x.max())
    bins = min(BINS, steps)
    grounds = []
    for b in range(bins):
        first, last = b * steps // bins, (b + 1) * steps // bins
        credit = float(credits[first:last].mean())
        share = min(abs(credit) / most, 1.0) if most else 0.0
        if share < 0.01:
            continue
        at, wide = WIDTH * first / steps, WIDTH * (last - first) / steps
        side = "for" if credit > 0 else "against"
        words = escape(f"step {first}{f' … {last - 1}' if last - first > 1 else ''}: {number(credit)}")
        grounds.append(
            f'<rect class="{side}" x="{at:.1f}" y="{top}" width="{wide:.1f}" height="{LANE}" opacity="{0.6 * share:.2f}">'
            f"<title>{words}</title></rect>"
        )
    points = []
    for part in torch.arange(steps).tensor_split(min(steps, 2 * BINS)):
        for i in sorted({int(part[x[part].argmin()]), int(part[x[part].argmax()])}):
            up = top + 6 + (LANE - 12) * (1 - (float(x[i]) - low) / ((high - low) or 1.0))
            points.append(f"{WIDTH * (i + 0.5) / steps:.1f} {up:.1f}")
    label = escape(name if not name.isdecimal() else f"channel {name}")
    span = f"{low:.3g} … {high:.3g}".replace("-", "−")
    return (
        f'<text x="0" y="{top - 6}">{label}</text>'
        f'<text x="{WIDTH}" y="{top - 6}" text-anchor="end">{span}</text>'
        + f'<rect class="lane" x="0" y="{top}" width="{WIDTH}" height="{LANE}"/>{"".join(grounds)}'
        f'<path d="M{"L".join(points)}"/>'
    )


_DRAWINGS: dict[str, Callable[[Explanation, Tensor, float], dict[str, Any]]] = {
    "image": _image,
    "text": _text,
    "table": _table,
    "series": _series,
}


# Together ---------------------------------------------------------------------------------------------------------------


def _render(explanations: Sequence[Explanation], whole: bool, title: str) -> str:
    tiles = [_tile(e) for e in explanations]
    methods = dict.fromkeys(e.method.replace("_", " ") for e in explanations if e.method)
    return str(
        _template().render(
            whole=whole,
            title=title,
            tiles=tiles,
            alone=len(tiles) == 1,
            methods=", ".join(methods),
            signed=any(bool((e.parts < 0).any()) for e in explanations),
        )
    )


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("workbench.attribution", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("explanation.html.j2")
