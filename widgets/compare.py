"""The comparison panel: a run's model, its variants and other runs, measured side by side on the run's held-out data."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

from widgets import theme
from widgets.compress import PERIOD, before_after, preamble, trained, variants
from widgets.form import Form
from widgets.job import CODE, Job
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
        self._error = ""
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
        assert self.run is None or self.run.path
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
        return preamble(self.run).replace("import Run, compare, save_model", "import Run, compare").replace("model = run.load_model()\n", "") + (
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

    def _jobs_done(self) -> list[Job]:
        """This run's comparisons, newest first."""
        if self.run is None:
            return []
        folders = [p for p in (self.run.path / "comparisons").glob("*") if (p / CODE).exists()]
        return [Job(p) for p in sorted(folders, key=lambda p: p.stat().st_ctime, reverse=True)]

    def _next_name(self) -> str:
        taken = {job.folder.name for job in self._jobs_done()}
        return next(name for n in range(1, len(taken) + 2) if (name := f"compare-{n}") not in taken)

    def _build(self) -> ipywidgets.Widget:
        self._form = Form(CompareConfig)
        on: dict[str, Any] = {"act": self._clicked, "run": self._choose, "tick": self._tick, "report": self._open_report, "cancel": self._cancel}
        self._source, self._button, self._results = Surface(on=on), Surface(on=on), Surface(on=on)
        left = box("wb-column", [self._source, self._form, self._button])
        frame = self._frame(box("wb-split", [left, box("wb-column", [self._results])]), self._code("Compare runs this code"))
        self._refresh()
        self._form.on_change(lambda config: self._refresh())
        self._watch()
        return frame

    def _summary(self) -> str:
        done = [job for job in self._jobs_done() if job.result.get("rows")]
        if not done:
            return super()._summary()
        return before_after(done[0].result["rows"]) + "".join(theme.notice(t, kind="warning") for t in done[0].result["warnings"])

    def _refresh(self) -> None:
        assert self._form is not None
        run, chosen = self.run, self.chosen
        options = "".join(
            f'<option value="{escape(str(r.path), True)}"{" selected" if run is not None and r.path == run.path else ""}>{escape(r.id)}</option>'
            for r in trained()
        )
        ticks = "".join(
            f'<label class="row wb-tick" data-key="{escape(str(path), True)}"><input type="checkbox" data-action="tick" data-value="{escape(str(path), True)}"'
            f'{" checked" if name in chosen else ""}><span class="mono nowrap" title="{escape(str(path), True)}">{escape(name)}</span></label>'
            for name, path in list(self.candidates.items())[:50]
        )
        self._source.html = (
            f'<div class="stack"><label class="wb-source"><span class="quiet small">original, and its held-out data</span>'
            f'<select data-input="run">{options}</select></label><div class="wb-ticks" role="group" aria-label="Compare with">{ticks}</div></div>'
        )
        jobs = self._jobs_done()
        running = any(job.status == "running" for job in jobs)
        off = " disabled" if run is None or running or self._form.message else ""
        self._button.html = (
            f'<div class="stack"><div class="row"><span class="quiet small grow">{len(chosen) + 1} models</span>'
            f'<button class="primary" data-action="act"{off}>Compare</button></div>{self._error}</div>'
        )
        body = self._job_html(jobs[0]) if jobs else ""
        self._results.html = body or '<div class="wb-empty"><p class="quiet">Accuracy, size and latency appear here, side by side.</p></div>'
        self._show_code(title="Compare runs this code")

    def _job_html(self, job: Job) -> str:
        status, result = job.status, job.result
        name = escape(job.folder.name)
        action = ""
        if status == "running":
            action = f'<button data-action="cancel" data-value="{escape(str(job.folder), True)}">Cancel</button>'
        elif (job.folder / REPORT).exists():
            action = f'<button data-action="report" data-value="{escape(str(job.folder / REPORT), True)}">Open the report</button>'
        head = (
            f'<div class="row wb-head">{theme.chip(status)}<span class="mono grow nowrap" title="{escape(str(job.folder), True)}">{name}</span>'
            f'<span class="quiet small keep">{theme.duration(job.seconds)}</span>{action}</div>'
        )
        if status == "running":
            return f'<section class="stack">{head}<progress aria-label="Measuring"></progress></section>'
        rows = result.get("rows") or []
        body = before_after(rows) if rows else ""
        body += "".join(theme.notice(text, kind="warning") for text in result.get("warnings", []))
        body += scatter(rows, "latency_p50_ms", "latency of one sample, ms") if rows else ""
        return f'<section class="stack">{head}{body}{job.problem()}</section>'

    # -- actions ---------------------------------------------------------------------------------------------------

    def _clicked(self, _value: Any, _values: Mapping[str, Any]) -> None:
        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh()

        self._error = ""
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
            running = any(job.status == "running" for job in self._jobs_done())
            self._refresh()
            if not running or self._closed.wait(PERIOD):
                return
