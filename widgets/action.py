"""What the panels share that make something from a trained run: a source, a form, a job a click, and the results so far.

A result lies in a folder of its run, ``variants/prune-1`` or ``comparisons/compare-2``, with the code that made it and how that
went (:class:`~widgets.job.Job`); so a panel made anew finds results, and jobs that still run. The module's functions draw them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import ipywidgets

from widgets import theme
from widgets.form import Form
from widgets.job import CODE, Job
from widgets.markup import Html, button, select, tag, text
from widgets.panel import Panel, box, newest, open_code
from widgets.surface import Surface
from workbench.config import Config
from workbench.errors import ConfigError, RunError
from workbench.run import Run

PERIOD = 0.5
"""Seconds between two looks at a job that runs."""

PREAMBLE = """\
from workbench import {names}
from workbench.comparison import CompareConfig
from workbench.data import load_batches

run = {open}
held_out = load_batches(run.config.data, root=run.path)
"""


class ActionPanel(Panel):
    """Base of the panels for pruning, quantization and comparison.

    Args:
        run: the run to start from; by default the newest that has a model.
        config: what the form starts from.
    """

    verb: ClassVar[str]
    store: ClassVar[str]
    """Folder of the run that holds the results."""
    config_class: ClassVar[type[Config]]
    empty: ClassVar[str]
    source_label: ClassVar[str] = "source run"
    wide: ClassVar[bool] = False
    """Whether the results take the whole width, below the form."""

    def __init__(self, run: Run | None = None, config: Any = None) -> None:
        super().__init__()
        self.run: Run | None = run if run is not None else next(iter(trained()), None)
        self._initial = config or self.config_class()
        self._form: Form[Any] | None = None
        self._error = Html()
        self._watcher: threading.Thread | None = None

    # -- what a user meets -----------------------------------------------------------------------------------------

    @property
    def form(self) -> Form[Any]:
        """The form; ``panel.form.value`` is the config it describes."""
        _ = self.view
        assert self._form is not None
        return self._form

    @property
    def config(self) -> Any:
        """The config of the next click.

        Raises:
            ConfigError: a setting of the form is wrong.
        """
        return self._initial if self._form is None else self._form.value

    @property
    def code(self) -> str:
        if self.run is None:
            return "# Train a model first.\n"
        try:
            return self._code_for(self.run, self.config, self._next_name())
        except ConfigError as error:
            return f"# {error}\n"

    @property
    def jobs(self) -> list[Job]:
        """What the panel made of this run, newest first."""
        if self.run is None:
            return []
        folders = [path for path in (self.run.path / self.store).glob(f"{self.verb}-*") if (path / CODE).exists()]
        return [Job(path) for path in sorted(folders, key=lambda path: path.stat().st_ctime, reverse=True)]

    def act(self) -> Job:
        """Do what the button does, in a process of its own; returns at once.

        Raises:
            RunError: there is no trained run.
            ConfigError: a setting of the form is wrong.
        """
        if self.run is None:
            raise RunError(f"There is no trained run to {self.verb}.", "Train one first.")
        _ = self.config
        job = Job.start(self.run.path / self.store / self._next_name(), self.code)
        self._watch()
        return job

    def attach(self, run: Run) -> None:
        """Start from ``run``."""
        self.run = run
        if self._form is not None:
            self._refresh()
        self._turned(run)

    # -- for the panels --------------------------------------------------------------------------------------------

    def _code_for(self, run: Run, config: Any, name: str) -> str:
        raise NotImplementedError(f"{type(self).__name__} must say which code its button runs.")

    def _choices(self) -> Html | None:
        """What can be chosen beside the source run."""
        return None

    def _results_html(self) -> list[Html]:
        return [self._section(job) for job in self.jobs]

    def _section(self, job: Job) -> Html:
        return section(job, self._action(job))

    def _action(self, job: Job) -> Html | None:
        """The button beside a result."""
        return button("Cancel", "cancel", value=job.folder.name) if job.status == "running" else None

    def _handlers(self) -> dict[str, Any]:
        return {"act": self._clicked, "run": self._choose, "cancel": self._cancel}

    def _job(self, name: Any) -> Job | None:
        return next((job for job in self.jobs if job.folder.name == name), None)

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        on = self._handlers()
        self._source, self._button, self._results = Surface(on=on), Surface(on=on), Surface(on=on)
        self._form = Form(self.config_class, self._initial)
        code = self._code(f"{self.verb.capitalize()} runs this code")
        if self.wide:
            split = box("wb-split", [box("wb-column", [self._source, self._button]), box("wb-column", [self._form])])
            frame = self._frame(split, self._results, code)
        else:
            left = box("wb-column", [self._source, self._form, self._button])
            frame = self._frame(box("wb-split", [left, box("wb-column", [self._results])]), code)
        self._refresh()
        self._form.on_change(lambda config: self._refresh())
        self._watch()
        return frame

    def _summary(self) -> Html:
        made = self._results_html()[:5]
        return text(made) if made else tag("p", self.empty) + tag("pre", self.code)

    def _refresh(self) -> None:
        form, run = self._form, self.run
        assert form is not None
        runs = trained()
        if run is not None and all(other.path != run.path for other in runs):
            runs = [run, *runs]
        options = [(str(other.path), other.id) for other in runs]
        chooser = select(options, str(run.path) if run is not None else "", "run", self.source_label)
        label = tag("label", tag("span", self.source_label, cls="quiet small"), chooser, cls="wb-source")
        self._source.html = tag("div", label, self._choices(), cls="stack")

        problem, has_model = self._error, run is not None and (run.path / "model.safetensors").exists()
        if run is not None and not has_model:
            remedy = "Wait until it has finished, or choose another."
            problem = theme.notice(f"The run {run.id} has no model yet.", kind="warning", remedy=remedy)
        off = not has_model or bool(form.message) or any(job.status == "running" for job in self.jobs)
        act = button(self.verb.capitalize(), "act", primary=True, off=off)
        self._button.html = tag("div", tag("div", tag("span", cls="grow"), act, cls="row"), problem, cls="stack")

        made = self._results_html()
        self._results.html = tag("div", made, cls="wb-variants") if made else theme.empty(self.empty)
        self._show_code(title=f"{self.verb.capitalize()} runs this code")

    # -- actions ---------------------------------------------------------------------------------------------------

    def _clicked(self, _value: Any, _values: Mapping[str, Any]) -> None:
        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh()

        self._error = Html()
        self._do(self.act, fail)

    def _choose(self, value: Any, _values: Mapping[str, Any]) -> None:
        self._do(lambda: self.attach(Run.open(str(value))), lambda error: None)

    def _cancel(self, value: Any, _values: Mapping[str, Any]) -> None:
        if (job := self._job(value)) is not None:
            self._do(job.cancel, lambda error: None)

    def _next_name(self) -> str:
        taken = {job.folder.name for job in self.jobs}
        return next(name for n in range(1, len(taken) + 2) if (name := f"{self.verb}-{n}") not in taken)

    def _watch(self) -> None:
        """Redraw while a job runs."""
        with self._lock:
            if self._form is None or self._closed.is_set():
                return
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._look, name=f"{self.verb}-watch", daemon=True)
                self._watcher.start()

    def _look(self) -> None:
        while not self._closed.is_set():
            running = any(job.status == "running" for job in self.jobs)  # before drawing, so that the end is drawn too
            self._refresh()
            if not running or self._closed.wait(PERIOD):
                return


def trained() -> list[Run]:
    """Runs that have a model, newest first."""
    return [run for run in newest() if (run.path / "model.safetensors").exists()]


def preamble(run: Run, names: Iterable[str]) -> str:
    """Imports, ``run`` and its held-out batches."""
    return PREAMBLE.format(names=", ".join(sorted({"Run", "compare", *names})), open=open_code(run))


def head_of(job: Job, action: Html | None) -> Html:
    """The line above a result: how it stands, its name, how long it took, and what can be done with it."""
    took = tag("span", theme.duration(job.seconds), cls="quiet small keep")
    return theme.heading(job.status, job.folder.name, took, action, title=str(job.folder))


def section(job: Job, action: Html | None) -> Html:
    """A job that measures models: its state, then the table and the warnings."""
    head = head_of(job, action)
    if job.status == "running":
        return tag("section", head, tag("progress", aria_label="Working"), cls="stack")
    result = job.result
    rows = result.get("rows") or []
    warnings = [theme.notice(words, kind="warning") for words in result.get("warnings", [])]
    return tag("section", head, before_after(rows) if rows else None, warnings, job.problem(), cls="stack")


def before_after(rows: Iterable[Mapping[str, Any]]) -> Html:
    """A comparison's rows as a table of the facts that decide."""
    shown = [
        {
            "model": row["variant"],
            "form": row["form"],
            "accuracy": f"{100 * row['accuracy']:.2f} %",
            "parameters": row["parameters"],
            "file": size(row["file_bytes"]),
            "latency": f"{row['latency_p50_ms']:.2f} ms",
            "speed": f"{row['speed_ratio']:.2f}×",
        }
        for row in rows
    ]
    return theme.table(shown, right=("accuracy", "file", "latency", "speed"))


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
