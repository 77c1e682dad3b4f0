"""The list of runs: what was trained, how it went, and a click to reopen it.

* :class:`RunList` — the panel.
* :class:`Row`, :func:`row_of` — one run in a few facts, read without importing anything the run was trained with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets

from widgets import theme
from widgets.markup import Html, select, tag, text
from widgets.panel import Panel, newest, open_code
from widgets.surface import Surface
from workbench import events
from workbench.config import load_yaml
from workbench.errors import WorkbenchError
from workbench.run import TERMINAL, Run, runs_folder

PERIOD = 2.0
"""Seconds between two looks at the runs' folder."""
LIMIT = 200
"""Rows drawn at most; a filter reaches the others."""
STATUSES = ("running", "paused", "finished", "stopped", "failed", "lost")


@dataclass(frozen=True)
class Row:
    """One run in a table."""

    run: Run
    status: str
    label: str
    model: str
    data: str
    loss: float | None
    metric: str
    started: float
    seconds: float
    progress: float

    def facts(self) -> dict[str, Any]:
        """The row for a plain table."""
        return {
            "run": self.run.id,
            "status": self.status,
            "model": self.model,
            "data": self.data,
            "loss": self.loss,
            "metric": self.metric,
            "started": _when(self.started),
            "duration": theme.duration(self.seconds),
        }

    def matches(self, words: str, status: str) -> bool:
        text = f"{self.run.id} {self.label} {self.model} {self.data}".casefold()
        return (not status or self.status == status) and all(word in text for word in words.casefold().split())


def row_of(run: Run) -> Row:
    """The facts of a run.

    Raises:
        WorkbenchError: its folder does not open.
    """
    values = load_yaml((run.path / "config.yaml").read_text(encoding="utf-8"), str(run.path))
    said, status = run.events, run.status
    loss = next((e.loss[-1] for e in reversed(said) if isinstance(e, events.Steps) and e.loss), None)
    metrics = {name: value for name, value in run.metrics.items() if not name.endswith("loss")}
    name, value = next(iter(metrics.items()), ("", None))
    started = said[0].time if said else (run.path / "config.yaml").stat().st_mtime
    ended = said[-1].time if said and status in TERMINAL else time.time() if status not in (*TERMINAL, "created") else started
    return Row(
        run=run,
        status=status,
        label=str(values.get("label") or ""),
        model=_name(values.get("model")),
        data=_name(values.get("data")),
        loss=loss,
        metric=f"{name} {theme.number(value)}" if name else "",
        started=started,
        seconds=ended - started,
        progress=run.progress.fraction,
    )


class RunList(Panel):
    """Every run under the runs' folder, newest first.

    Args:
        on_open: called with the run that was clicked.

    Example:
        >>> runs = RunList(on_open=lambda run: print(run.history.tail()))
        >>> runs.selected
    """

    title = "Runs"

    def __init__(self, on_open: Callable[[Run], None] | None = None) -> None:
        super().__init__()
        self.selected: Run | None = None
        self._on_open = on_open
        self._words = self._status = ""
        self._cache: dict[str, tuple[float, Row]] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def code(self) -> str:
        if self.selected is None:
            return "from workbench import Run\n\nruns = Run.all()\n"
        return f"from workbench import Run\n\nrun = {open_code(self.selected)}\nrun.history.tail()\n"

    def rows(self) -> list[Row]:
        """What the list shows, filtered."""
        return [row for row in self._read() if row.matches(self._words, self._status)]

    def refresh(self) -> None:
        """Look again now."""
        self._wake.set()

    def filter(self, words: str = "", status: str = "") -> None:
        """Show only runs whose name, model or data hold all ``words``, and of one status."""
        self._words, self._status = words, status
        self._draw()

    def close(self) -> None:
        super().close()
        self._wake.set()

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        on = {
            "words": lambda value, _: self.filter(str(value), self._status),
            "status": lambda value, _: self.filter(self._words, str(value)),
            "open": self._open,
        }
        self._surface = Surface(on=on)
        frame = self._frame(self._surface, self._code("Opens the chosen run"))
        self._draw()
        self._thread = threading.Thread(target=self._watch, name="run-list", daemon=True)
        self._thread.start()
        return frame

    def _summary(self) -> Html:
        rows = self.rows()[:30]
        return theme.table([row.facts() for row in rows]) if rows else tag("p", "No runs yet.")

    def _watch(self) -> None:
        while not self._closed.is_set():
            started = time.thread_time()
            self._draw()
            self._wake.wait(max(PERIOD, 20 * (time.thread_time() - started)))
            self._wake.clear()

    def _read(self) -> list[Row]:
        rows = []
        with self._lock:
            for run in newest():
                try:
                    stamp = max(p.stat().st_mtime for p in (run.path / "attempts", *run.path.glob("events/rank-00000.jsonl")))
                    known = self._cache.get(run.id)
                    if known and known[0] == stamp and known[1].status in (*TERMINAL, "created"):
                        rows.append(known[1])
                        continue
                    row = row_of(known[1].run if known else run)
                    self._cache[run.id] = (stamp, row)
                    rows.append(row)
                except (WorkbenchError, OSError, ValueError) as error:
                    rows.append(Row(run, "unreadable", "", "", "", None, str(error)[:60], 0.0, 0.0, 0.0))
        return rows

    def _draw(self) -> None:
        rows = self._read()
        shown = [row for row in rows if row.matches(self._words, self._status)]
        words = {
            "data_input": "words",
            "placeholder": "Filter by name, model or data",
            "aria_label": "Filter runs",
            "value": self._words,
        }
        statuses = [(status, status or "any status") for status in ("", *STATUSES)]
        head = tag(
            "div",
            tag("input", type="search", cls="grow", **words),
            select(statuses, self._status, "status", "Status"),
            tag("span", f"{len(shown)} of {len(rows)}", cls="quiet small keep"),
            cls="row wb-filter",
        )
        if shown:
            body = self._table(shown)
        elif rows:
            body = theme.empty("No run matches the filter.")
        else:
            body = theme.empty("No runs yet.", f"They will lie under {runs_folder()}.")
        self._surface.html = tag("div", head, body, cls="stack")

    def _table(self, rows: list[Row]) -> Html:
        names = ("run", "status", "model", "data", "loss", "metric", "started", "duration")
        cls = {name: "number" if name in ("loss", "started", "duration") else "" for name in names}
        head = [tag("th", name, scope="col", cls=cls[name]) for name in names]
        lines = [
            self._line(row, [tag("td", theme.number(row.facts()[n]), cls=cls[n]) for n in names[2:]]) for row in rows[:LIMIT]
        ]
        more = tag("p", f"{len(rows) - LIMIT} more: filter to see them.", cls="quiet small") if len(rows) > LIMIT else None
        whole = tag("table", tag("thead", tag("tr", head)), tag("tbody", lines))
        return tag("div", whole, cls="scroll wb-runs") + text(more)

    def _line(self, row: Row, cells: list[Html]) -> Html:
        name, chosen = row.run.id, self.selected is not None and self.selected.path == row.run.path
        first = tag("td", row.label or _short(name), cls="mono nowrap wb-run", title=str(row.run.path))
        cls = "choice current" if chosen else "choice"
        does = {"data_key": name, "data_action": "open", "data_value": name, "tabindex": 0, "aria_label": f"Open {name}"}
        return tag("tr", first, tag("td", theme.chip(row.status)), cells, cls=cls, **does)

    def _open(self, value: Any, _values: Mapping[str, Any]) -> None:
        known = self._cache.get(str(value))
        if known is None:
            return
        self.selected = known[1].run
        self._show_code(title="Opens the chosen run")

        def work() -> None:
            self._draw()
            if self._on_open is not None:
                self._on_open(known[1].run)

        self._do(work, lambda error: None)


def _name(part: Any) -> str:
    return str(part.get("name", "")).rsplit("/", 1)[-1] if isinstance(part, Mapping) else ""


def _short(identifier: str) -> str:
    """A run's id without the date, which has a column of its own."""
    date, _, rest = identifier.partition("-")
    clock, _, name = rest.partition("-")
    return name if date.isdigit() and clock.isdigit() and name else identifier


def _when(seconds: float) -> str:
    if not seconds:
        return "–"
    moment = time.localtime(seconds)
    today = time.localtime()
    return time.strftime("%H:%M" if moment[:3] == today[:3] else "%d %b %H:%M", moment)
