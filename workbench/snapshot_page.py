"""A memory snapshot as a page: one HTML file that needs nothing else, light or dark as the reader's system is.

* :func:`snapshot_page` — writes the page of a run's snapshot, or of a file;
* :func:`snapshot_html` — the page as text, for the Inspector;
* ``snapshot.html``, ``snapshot.js`` — the page and what draws it. Names reach it as text only, and its policy forbids requests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.errors import RunError
from workbench.run import Run
from workbench.snapshots import read_snapshot

HERE = Path(__file__).parent


def snapshot_page(
    run_or_path: Run | str | os.PathLike[str], path: str | os.PathLike[str] | None = None, *, rank: int = 0, trust: bool = False
) -> Path:
    """Write the page of a memory snapshot: allocations over time by holder or line of code, and the map of the segments.

    Args:
        run_or_path: a run, whose latest snapshot is taken; a snapshot's ``.json``; or a ``.pickle`` of PyTorch's.
        path: of the page; by default beside the snapshot.
        rank: whose, of a run.
        trust: open a pickle, which can run code.

    Returns:
        Where the page lies.

    Raises:
        RunError: there is no snapshot, or a pickle that is not trusted.

    Example:
        >>> run.memory_snapshot(steps=2)       # while it trains, on a GPU
        >>> memory.snapshot_page(run)
    """
    source = latest(run_or_path, rank) if isinstance(run_or_path, Run) else Path(run_or_path)
    target = Path(path) if path is not None else source.with_suffix(".html")
    storage.write_atomic(target, snapshot_html(read_snapshot(source, trust=trust)))
    return target


def latest(run: Run, rank: int = 0) -> Path:
    """A run's latest snapshot of a rank.

    Raises:
        RunError: it has none.
    """
    found = [path for path in run.snapshots if path.stem.endswith(f"-rank-{rank}")]
    if not found:
        raise RunError(
            f"The run {run.id} has no memory snapshot of rank {rank}.",
            "On a GPU, run.memory_snapshot() asks for one, and probes.memory.snapshot_steps=2 records one at the start.",
        )
    return found[-1]


def snapshot_html(content: Mapping[str, Any], theme: str = "") -> str:
    """The page of a snapshot's content.

    Args:
        theme: ``light`` or ``dark``; by default as the reader's system is.
    """
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "snapshot.html").read_text(encoding="utf-8")
    script = (HERE / "snapshot.js").read_text(encoding="utf-8")
    return page.replace("__THEME__", theme).replace("__SCRIPT__", script).replace("__DATA__", data)
