"""The Inspector's page as one HTML file, which needs neither network nor kernel.

The file holds the page's own scripts (:data:`SCRIPTS`), plotly.js and the recordings, both compressed and as base64;
``offline.js`` unpacks them and answers the page in the kernel's place. Its policy forbids every request, and every script but
its own, by hash.

* :func:`page` — the file's content.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from widgets import theme
from widgets.frames import Columns, Frame
from widgets.inspector.histograms import levels
from widgets.inspector.ranks import STATS
from widgets.inspector.recording import Recording
from widgets.live_plot import compressed_plotly, module

SCRIPTS = (
    *("plotting.js", "inspector/parts.js", "inspector/rows.js", "inspector/time.js", "inspector/compare.js"),
    *("inspector/inspector.js", "inspector/charts.js", "inspector/memory.js", "inspector/heat.js"),
)
"""The page's scripts, in order; ``inspector/widget.js`` starts them in a notebook, ``inspector/offline.js`` in a file."""
LIMIT = 6_000_000
"""Bytes of a file, at most."""


def page(name: str, recordings: Mapping[str, Recording], words: Mapping[str, Any], limit: int = LIMIT) -> bytes:
    """The file, at most ``limit`` bytes: heat maps lose every other column until they fit.

    Args:
        name: of the run.
        recordings: to show: ``""`` the run itself, ``"beside"`` the one that it is compared with.
        words: facts that are not the recordings' own, by name.
    """
    for stride in (1, 2, 4, 8, 16, 32):
        content = _page(name, _packed(recordings, words, stride))
        if len(content) <= limit:
            break
    return content


def _page(name: str, data: bytes) -> bytes:
    script = module(*SCRIPTS, "plotly_source.js", "inspector/offline.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # strict-dynamic: plotly.js, which the script unpacks into an element of its own.
    policy = f"default-src 'none'; script-src 'sha256-{digest}' 'strict-dynamic'; style-src 'unsafe-inline'; img-src data: blob:"
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}</title>",
        f"<style>{theme.css('inspector/inspector.css', 'inspector/memory.css', 'inspector/offline.css')}</style>",
        '<body class="wb-offline"><main></main>',
        '<noscript><p class="wb">This page draws with scripts of its own; it makes no requests.</p></noscript>',
        *(_block(name, content) for name, content in (("plotly", compressed_plotly()), ("data", data))),
        f'<script type="module">{script}</script>\n</body>\n</html>\n',
    ]
    return "\n".join(parts).encode()


def _block(name: str, content: bytes) -> str:
    return f'<script type="application/octet-stream" id="{name}">{base64.b64encode(content).decode()}</script>'


def _packed(recordings: Mapping[str, Recording], words: Mapping[str, Any], stride: int) -> bytes:
    """One frame of everything, compressed: its operations as JSON, a zero byte, its buffer."""
    frame = Frame()
    for of, recording in recordings.items():
        mark = len(frame.operations)
        _write(recording, frame, stride)
        for operation in frame.operations[mark:]:
            operation["run"] = of
    for fact, value in words.items():
        frame.add("fact", fact, value=value)
    return gzip.compress(json.dumps(frame.operations).encode() + b"\0" + frame.buffer, 9, mtime=0)


def _write(recording: Recording, frame: Frame, stride: int) -> None:
    for name, value in recording.facts().items():
        frame.add("fact", name, value=value)
    for name, line in recording.lines.items():
        x, y = line.arrays()
        frame.add("line", name, x, _rounded(y), at=0, n=len(x))
    grids = {"gradients": recording.gradients} | {f"gradients:{name}": grid for name, grid in recording.others.items()}
    grids["memory:parts"] = recording.holding.stack
    for name, grid in grids.items():
        if grid is not None:
            x, values = _thinned(grid, stride)
            frame.add("columns", name, x, _rounded(values), at=0, n=len(x), rows=grid.rows)
    if recording.activations is not None:
        _write_distributions(recording, frame, stride)


def _write_distributions(recording: Recording, frame: Frame, stride: int) -> None:
    """Every layer's distribution at every step of the history: bytes, the count that 255 stands for, and what goes with it."""
    assert recording.activations is not None
    x, values = _thinned(recording.activations, stride)
    counts = np.nan_to_num(values.reshape(len(x), -1, recording.bins))
    layers = counts.shape[1]
    stats = np.full((len(x), layers, len(STATS)), np.nan)
    for column, step in enumerate(x):
        stats[column] = recording.stats.get(float(step), np.nan)
    stats[-1] = recording.latest_stats
    shape = {"n": len(x), "rows": layers, "bins": recording.bins, "stats": len(STATS)}
    frame.add("history", "activations", x, counts.max(axis=2), _rounded(stats), packed=levels(counts), **shape)


def _thinned(grid: Columns, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a heat map with ``stride`` neighbouring columns merged into one."""
    if stride == 1:
        return grid.x, grid.values
    starts = np.arange(0, len(grid), stride)
    merge = np.add if grid.merge == "sum" else np.fmax
    return grid.x[starts], merge.reduceat(grid.values, starts, axis=0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 with eleven bits after the point, a tenth of a per mille, which halves the compressed size."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    return ((bits + 0x800) & np.uint32(0xFFFFF000)).view("<f4")
