"""The comparison panel: a run's model, its variants and other runs, measured side by side on the run's held-out data."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets

from widgets import theme
from widgets.compress import PERIOD, job_section, preamble, source, trained, variants
from widgets.form import Form
from widgets.job import CODE, Job
from widgets.markup import Html, button, tag
from widgets.panel import Panel, box
from widgets.scatter import scatter
from widgets.surface import Surface
from workbench.comparison import CompareConfig
from workbench.errors import ConfigError, RunError
from workbench.run import Run

REPORT = "comparison.html"


class ComparePanel(Panel):
    """Choose variants, measure them in turns, read table, plot and warnings.

    Args:
        run: the run whose data to measure on, and whose model comes first; by default the newest that has one.
        chosen: folders of the variants and runs to compare it with; by default all its variants.

    Example:
        >>> ComparePanel(run)
    """

    title = "Compare"

    def __init__(self, run: Run | None = None, chosen: Iterable[Path | str] | None = None) -> None:
        super().__init__()
        self.run: Run | None = run if run is not None else next(iter(trained()), None)
        self._chosen: set[str] | None = {str(path) for path in chosen} if chosen is not None else None
        self._form: Form[CompareConfig] | None = None
        self._error = Html()
        self._watcher: threading.Thread | None = None

    # -- what a user meets -----------------------------------------------------------------------------------------

    @property
    def candidates(self) -> dict[str, Path]:
        """What can be compared with the run's own model, by name: its variants, then other trained runs."""
        if self.run is None:
            return {}
        own = {variant.name: variant.path for variant in variants(self.run) if variant.ready}
        return own | {run.id: run.path for run in trained() if run.path != self.run.path}

    @property
    def chosen(self) -> dict[str, Path]:
        """The candidates that are ticked."""
        wanted = self._chosen
        own = self.run.path / "variants" if self.run is not None else None
        return {name: p for name, p in self.candidates.items() if (str(p) in wanted if wanted is not None else p.parent == own)}

    @property
    def code(self) -> str:
        if self.run is None:
            return "# Train a model first.\n"
        try:
            config = self._form.value if self._form is not None else CompareConfig()
        except ConfigError as error:
            return f"# {error}\n"
        lines = []
        for name, path in self.chosen.items():
            inside = path.relative_to(self.run.path) if path.is_relative_to(self.run.path) else None
            lines.append(f"    {name!r}: {f'run.path / {str(inside)!r}' if inside else repr(str(path))},\n")
        return preamble(self.run) + (
            f'variants = {{\n    "original": run,\n{"".join(lines)}}}\n'
            f"comparison = compare(variants, held_out, {config.to_code()})\n"
            f'comparison.to_html(run.path / "comparisons" / {self._next_name()!r} / "{REPORT}")\n'
        )

    def act(self) -> Job:
        """Compare, in a process of its own; returns at once.

        Raises:
            RunError: there is no trained run.
        """
        if self.run is None:
            raise RunError("There is no trained run to compare.", "Train one first.")
        job = Job.start(self.run.path / "comparisons" / self._next_name(), self.code)
        self._watch()
        return job

    def attach(self, run: Run) -> None:
        """Compare on the data of ``run``."""
        self.run, self._chosen = run, None
        if self._view is not None:
            self._refresh()

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _comparisons(self) -> list[Job]:
        """This run's comparisons, newest first."""
        if self.run is None:
            return []
        folders = [p for p in (self.run.path / "comparisons").glob("*") if (p / CODE).exists()]
        return [Job(p) for p in sorted(folders, key=lambda p: p.stat().st_ctime, reverse=True)]

    def _next_name(self) -> str:
        taken = {job.folder.name for job in self._comparisons()}
        return next(name for n in range(1, len(taken) + 2) if (name := f"compare-{n}") not in taken)

    def _build(self) -> ipywidgets.Widget:
        self._form = Form(CompareConfig)
        on: dict[str, Any] = {"act": self._clicked, "run": self._choose, "tick": self._tick}
        on |= {"report": self._open_report, "cancel": self._cancel}
        self._source, self._button, self._results = Surface(on=on), Surface(on=on), Surface(on=on)
        left = box("wb-column", [self._source, self._form, self._button])
        frame = self._frame(box("wb-split", [left, box("wb-column", [self._results])]), self._code("Compare runs this code"))
        self._refresh()
        self._form.on_change(lambda config: self._refresh())
        self._watch()
        return frame

    def _summary(self) -> Html:
        done = [job for job in self._comparisons() if job.result.get("rows")]
        if not done:
            return super()._summary()
        return self._section(done[0])

    def _refresh(self) -> None:
        assert self._form is not None
        chosen, jobs = self.chosen, self._comparisons()
        ticks = [self._tick_html(name, path, name in chosen) for name, path in list(self.candidates.items())[:50]]
        first = source(trained(), str(self.run.path) if self.run is not None else "", "original, and its held-out data")
        self._source.html = tag(
            "div", first, tag("div", ticks, cls="wb-ticks", role="group", aria_label="Compare with"), cls="stack"
        )
        off = self.run is None or bool(self._form.message) or any(job.status == "running" for job in jobs)
        count = tag("span", f"{len(chosen) + 1} models", cls="quiet small grow")
        line = tag("div", count, button("Compare", "act", primary=True, off=off), cls="row")
        self._button.html = tag("div", line, self._error, cls="stack")
        self._results.html = (
            self._section(jobs[0]) if jobs else theme.empty("Accuracy, size and latency appear here, side by side.")
        )
        self._show_code(title="Compare runs this code")

    @staticmethod
    def _tick_html(name: str, path: Path, on: bool) -> Html:
        box_ = tag("input", type="checkbox", data_action="tick", data_value=str(path), checked=on)
        return tag("label", box_, tag("span", name, cls="mono nowrap", title=str(path)), cls="row wb-tick", data_key=str(path))

    @staticmethod
    def _section(job: Job) -> Html:
        action = None
        if job.status == "running":
            action = button("Cancel", "cancel", value=str(job.folder))
        elif (job.folder / REPORT).exists():
            action = button("Open the report", "report", value=str(job.folder / REPORT))
        return job_section(
            job, job.folder.name, action, lambda rows: scatter(rows, "latency_p50_ms", "latency of one sample, ms")
        )

    # -- actions ---------------------------------------------------------------------------------------------------

    def _clicked(self, _value: Any, _values: Mapping[str, Any]) -> None:
        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh()

        self._error = Html()
        self._do(self.act, fail)

    def _choose(self, value: Any, _values: Mapping[str, Any]) -> None:
        self._do(lambda: self.attach(Run.open(str(value))), lambda error: None)

    def _tick(self, value: Any, _values: Mapping[str, Any]) -> None:
        wanted = {str(path) for path in self.chosen.values()}
        self._chosen = wanted ^ {str(value)}
        self._refresh()

    def _open_report(self, value: Any, _values: Mapping[str, Any]) -> None:
        path = Path(str(value))
        if self.run is not None and path.is_relative_to(self.run.path):
            self._do(lambda: self._results.show_page(path.read_text(encoding="utf-8")), lambda error: None)

    def _cancel(self, value: Any, _values: Mapping[str, Any]) -> None:
        if self.run is not None and Path(str(value)).is_relative_to(self.run.path):
            self._do(Job(Path(str(value))).cancel, lambda error: None)

    def _watch(self) -> None:
        with self._lock:
            if self._form is None or self._closed.is_set():
                return
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._look, name="compare-watch", daemon=True)
                self._watcher.start()

    def _look(self) -> None:
        while not self._closed.is_set():
            running = any(job.status == "running" for job in self._comparisons())
            self._refresh()
            if not running or self._closed.wait(PERIOD):
                return
