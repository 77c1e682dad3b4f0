"""Small static drawings for notebooks that are files: SVG inside HTML, a few kilobytes each, in the page's own colours.

* :func:`chart` — curves; :func:`heat_map` — rows × steps in 16 colours, one path a colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

INK = ("#4b7fe0", "#d98a1f", "#2a9d82", "#d65f55", "#8a66cc", "#6a9a3a")
VIRIDIS = (
    *("#440154", "#481a6c", "#472f7d", "#414487", "#39568c", "#31688e", "#2a788e", "#23888e"),
    *("#1f988b", "#22a884", "#35b779", "#54c568", "#7ad151", "#a5db36", "#d2e21b", "#fde725"),
)
WIDTH = 640
LEFT, BOTTOM, TOP, RIGHT = 48, 28, 20, 40
_TEXT = 'font-family="var(--jp-ui-font-family,sans-serif)" font-size="11" fill="var(--jp-ui-font-color2,#777)"'

Curve = tuple[np.ndarray, np.ndarray, int]


def chart(
    curves: Mapping[str, Curve],
    *,
    x_title: str = "step",
    log_y: bool = False,
    from_zero: bool = False,
    height: int = 220,
    points: int = 200,
) -> str:
    """Curves (x, y, axis 1 or 2) as SVG; "nothing recorded" when all are empty."""
    known = {n: (np.asarray(x), np.asarray(y, dtype="f8"), a) for n, (x, y, a) in curves.items() if len(x)}
    if not known:
        return note("nothing recorded yet")
    first, last = min(float(x.min()) for x, _, _ in known.values()), max(float(x.max()) for x, _, _ in known.values())
    inner, tall = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM
    parts: list[str] = []
    scales: dict[int, tuple[float, float]] = {}
    for axis in (1, 2):
        logged = log_y and axis == 1
        values = np.concatenate([_scaled(y, logged) for _, y, a in known.values() if a == axis] or [np.zeros(0)])
        finite = values[np.isfinite(values)]
        if len(finite):
            scales[axis] = 0.0 if from_zero else float(finite.min()), float(finite.max())
            parts.extend(_y_axis(*scales[axis], axis, tall, logged))
    at = float(LEFT)
    for index, (name, (x, y, axis)) in enumerate(known.items()):
        colour = INK[index % len(INK)]
        if axis in scales:
            low, high = scales[axis]
            ys = TOP + tall * (1 - (_scaled(y, log_y and axis == 1) - low) / ((high - low) or 1))
            xs = LEFT + inner * (x - first) / ((last - first) or 1)
            path = _path(*_thinned(xs, ys, points))
            parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>')
        swatch = f'<circle cx="{at:.0f}" cy="8" r="4" fill="{colour}"/>'
        parts.append(f'{swatch}<text x="{at + 8:.0f}" y="12" {_TEXT}>{escape(name)}</text>')
        at += 24 + 6.5 * len(name)
    parts.append(_x_axis(first, last, height, x_title))
    return _svg(parts, height, x_title)


def _y_axis(low: float, high: float, axis: int, tall: float, logged: bool) -> list[str]:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value, y = low + share * (high - low), TOP + tall * (1 - share)
        x, anchor = (LEFT - 6, "end") if axis == 1 else (WIDTH - RIGHT + 6, "start")
        label = _number(10**value if logged else value)
        parts.append(f'<text x="{x}" y="{y + 4:.0f}" text-anchor="{anchor}" {_TEXT}>{label}</text>')
        if axis == 1:
            line = f'<path d="M{LEFT} {y:.1f}h{WIDTH - LEFT - RIGHT}" stroke="var(--jp-border-color2,#ccc)" stroke-width="0.6"/>'
            parts.append(line)
    return parts


def heat_map(
    rows: Sequence[str],
    x: np.ndarray,
    z: np.ndarray,
    *,
    title: str,
    x_title: str = "step",
    ticks: Sequence[str] = (),
    pool_rows: bool = True,
) -> str:
    """A heat map of ``z``, shape (columns, rows), NaN left blank, on at most 28 × 48 cells; ``ticks`` label the x axis.

    Columns beyond that are drawn by their largest values, and so are rows, or with ``pool_rows`` off by every n-th.
    """
    if not len(rows) or not len(x):
        return note(f"{title}: nothing recorded yet")
    z = np.asarray(z, dtype="f8")
    every_row, every_column = math.ceil(len(rows) / 28), math.ceil(len(x) / 48)
    shown = _pooled(z, every_column).T  # rows × columns
    shown = _pooled(shown, every_row) if pool_rows else shown[::every_row]
    finite = shown[np.isfinite(shown)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    level = np.where(np.isfinite(shown), np.clip((shown - low) / ((high - low) or 1) * 15.999, 0, 15), -1).astype(int)
    left, cell = 190, 10
    tall, wide = cell * level.shape[0], (WIDTH - left - 8) / level.shape[1]
    parts = [f'<text x="0" y="12" {_TEXT}>{escape(title)}: {_number(low)} … {_number(high)}</text>']
    paths: dict[int, list[str]] = {}
    for r, row in enumerate(level):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for a, b in zip(edges, edges[1:], strict=False):
            if row[a] >= 0:
                x0, x1 = round(left + a * wide), round(left + b * wide)
                paths.setdefault(int(row[a]), []).append(f"M{x0} {TOP + r * cell + cell // 2}h{x1 - x0}")
        label = rows[r * every_row]
        label = label if len(label) <= 32 else "…" + label[-31:]
        parts.append(f'<text x="{left - 6}" y="{TOP + r * cell + 9}" text-anchor="end" {_TEXT}>{escape(label)}</text>')
    # Cells are thick strokes, which takes half the characters of rectangles.
    parts.extend(f'<path stroke="{VIRIDIS[k]}" stroke-width="{cell}" d="{"".join(d)}"/>' for k, d in sorted(paths.items()))
    height = TOP + tall + BOTTOM
    first, last = (ticks[0], ticks[-1]) if ticks else (_number(float(x[0])), _number(float(x[-1])))
    parts.append(f'<text x="{left}" y="{height - 12}" {_TEXT}>{escape(first)}</text>')
    parts.append(f'<text x="{WIDTH - 8}" y="{height - 12}" text-anchor="end" {_TEXT}>{escape(last)} {escape(x_title)}</text>')
    return _svg(parts, height, title)


def note(text: str) -> str:
    """A quiet line."""
    return f'<p style="color:var(--jp-ui-font-color2,#777);font-size:12px;margin:4px 0">{escape(text)}</p>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" style="width:100%;max-width:{WIDTH}px;height:auto;display:block"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label, True)}" {size}>'
    return f"{head}{''.join(parts)}</svg>"


def _x_axis(low: float, high: float, height: float, title: str) -> str:
    y = height - 10
    middle = f"{_number(low)}</text>"
    end = f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end" {_TEXT}>{_number(high)} {escape(title)}</text>'
    return f'<text x="{LEFT}" y="{y}" {_TEXT}>{middle}{end}'


def _scaled(y: np.ndarray, log: bool) -> np.ndarray:
    if not log:
        return y
    with np.errstate(all="ignore"):
        return np.where(y > 0, np.log10(np.where(y > 0, y, 1.0)), np.nan)


def _thinned(xs: np.ndarray, ys: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` points: the lowest and the highest of each stretch."""
    if len(xs) <= points:
        return xs, ys
    keep: list[int] = []
    for part in np.array_split(np.arange(len(xs)), points // 2):
        finite = part[np.isfinite(ys[part])]
        if len(finite):
            keep.extend(sorted({int(finite[np.argmin(ys[finite])]), int(finite[np.argmax(ys[finite])])}))
    return xs[keep], ys[keep]


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    commands, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        commands.append(f"{pen}{x:.0f} {y:.1f}")
        pen = "L"
    return "".join(commands)


def _pooled(z: np.ndarray, every: int) -> np.ndarray:
    """Maxima of each ``every`` neighbours along the first axis."""
    if every == 1:
        return z
    z = np.concatenate([z, np.full((-len(z) % every, z.shape[1]), np.nan)])
    blocks = z.reshape(-1, every, z.shape[1])
    empty = np.isnan(blocks).all(axis=1)
    return np.where(empty, np.nan, np.nanmax(np.where(np.isnan(blocks), -np.inf, blocks), axis=1))


def _number(value: Any) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}"
