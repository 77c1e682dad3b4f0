"""Memory snapshots in the Inspector's page: asked for, listed, opened."""

from __future__ import annotations

from typing import Any

from workbench.errors import WorkbenchError
from workbench.run import TERMINAL, Run
from workbench.snapshot_page import snapshot_html
from workbench.snapshots import read_snapshot


class SnapshotView:
    """What the page is told of a run's snapshots, and the one that is open."""

    def __init__(self) -> None:
        self._words = ""
        self._open: dict[str, Any] | None = None
        self._waiting: int | None = None

    def facts(self, run: Run) -> dict[str, Any]:
        """By name: which there are, whether one can be asked for, words about the last request; the page of the open one."""
        names = [path.stem for path in run.snapshots]
        if self._waiting is not None and len(names) > self._waiting:
            self._waiting, self._words = None, ""
        can = run.status not in (*TERMINAL, "created")
        return {"memory:snapshots": {"names": names, "can": can, "words": self._words}, "memory:snapshot": self._open}

    def request(self, run: Run, kind: str, value: Any) -> None:
        """Ask the run for a snapshot, or open one: ``value`` is then its name and the page's theme, or None to close."""
        try:
            if kind == "snapshot":
                self._ask(run)
            else:
                self._open = None if value is None else self._page(run, value)
        except WorkbenchError as error:
            self._words = str(error)

    def _ask(self, run: Run) -> None:
        started = next((event for event in reversed(run.events) if event.type == "attempt_started"), None)
        if started is not None and started.device == "cpu":
            self._words = "PyTorch records the allocations of GPUs only, and this run is on a CPU."
            return
        run.memory_snapshot()
        self._waiting, self._words = len(run.snapshots), "Recording the next two steps…"

    @staticmethod
    def _page(run: Run, value: Any) -> dict[str, Any] | None:
        path = next((path for path in run.snapshots if path.stem == value["name"]), None)
        if path is None:
            return None
        theme = "dark" if value.get("theme") == "dark" else "light"
        return {"name": path.stem, "key": f"{path.stem} {theme}", "html": snapshot_html(read_snapshot(path), theme)}
