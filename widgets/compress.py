"""What the pruning and quantization panels share: a source run, a form, a job, and the variants made so far.

A variant is a folder ``variants/NAME`` inside its run: the model, the code that made it, and how it compares with the original.
:func:`variants` lists them; :class:`CompressPanel` makes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets

from widgets import theme
from widgets.form import Form
from widgets.job import CODE, STARTED, Job
from widgets.markup import Html, button, select, tag, text
from widgets.panel import Panel, box, newest, open_code
from widgets.surface import Surface
from workbench.config import Config
from workbench.errors import ConfigError, RunError
from workbench.run import Run

PERIOD = 0.5
"""Seconds between two looks at a job that runs."""

LOAD = """\
run = {open}
data = run.config.data
batches = Batches(load_splits(data, root=run.path), data, Shard(), Target(torch.device("cpu")), run.config.seed)
held_out = [(x[:count], y[:count]) for x, y, count in batches.evaluation()]
"""
IMPORTS = """\
import torch

from workbench import {names}
from workbench.comparison import CompareConfig
from workbench.data import Batches, Shard, load_splits
from workbench.data.batches import Target
"""


@dataclass(frozen=True)
class Variant:
    """A model made from a run's, and what is known of it."""

    run: Run
    name: str

    @property
    def path(self) -> Path:
        return self.run.path / "variants" / self.name

    @property
    def job(self) -> Job:
        return Job(self.path)

    @property
    def ready(self) -> bool:
        return (self.path / "structure.json").exists()


def variants(run: Run, verb: str = "") -> list[Variant]:
    """A run's variants, newest first; those of one verb when given."""
    folders = [p for p in (run.path / "variants").glob(f"{verb}*") if (p / CODE).exists() or (p / "structure.json").exists()]
    return [Variant(run, p.name) for p in sorted(folders, key=lambda p: p.stat().st_ctime, reverse=True)]


def trained() -> list[Run]:
    """Runs that have a model, newest first."""
    return [run for run in newest() if (run.path / "model.safetensors").exists()]


class CompressPanel(Panel):
    """Base of the panels that make a smaller model from a trained one.

    Args:
        run: the run whose model to take; by default the newest that has one.
        config: what the form starts from.
    """

    verb: ClassVar[str]
    config_class: ClassVar[type[Config]]
    first: ClassVar[tuple[str, ...]] = ()
    empty: ClassVar[str]
    tunable: ClassVar[bool] = True
    """Whether what comes out can be trained further."""

    def __init__(self, run: Run | None = None, config: Any = None) -> None:
        super().__init__()
        self.run: Run | None = run if run is not None else next(iter(trained()), None)
        self._initial = config or self.config_class()
        self._form: Form[Any] | None = None
        self._error = Html()
        self._watcher: threading.Thread | None = None
        self._on_tune: Callable[[Path], None] | None = None

    # -- what a user meets -----------------------------------------------------------------------------------------

    @property
    def form(self) -> Form[Any]:
        _ = self.view
        assert self._form is not None
        return self._form

    @property
    def config(self) -> Any:
        """The config of the next variant.

        Raises:
            ConfigError: a setting of the form is wrong.
        """
        return self._initial if self._form is None else self._form.value

    @property
    def code(self) -> str:
        if self.run is None:
            return "# Train a model first.\n"
        try:
            return self._code_for(self.run, self.config, self._next_name(self.run))
        except ConfigError as error:
            return f"# {error}\n"

    def act(self) -> Job:
        """Do what the button does, in a process of its own; returns at once.

        Raises:
            RunError: there is no trained run.
            ConfigError: a setting of the form is wrong.
        """
        if self.run is None:
            raise RunError(f"There is no trained run to {self.verb}.", "Train one first.")
        _ = self.config
        job = Job.start(self.run.path / "variants" / self._next_name(self.run), self.code)
        self._watch()
        return job

    def attach(self, run: Run) -> None:
        """Take the model of ``run``."""
        self.run = run
        if self._view is not None:
            self._refresh()

    def on_tune(self, listener: Callable[[Path], None]) -> None:
        """Offer to train a variant further: ``listener`` is given its folder."""
        self._on_tune = listener

    # -- for the panels --------------------------------------------------------------------------------------------

    def _code_for(self, run: Run, config: Any, name: str) -> str:
        raise NotImplementedError

    def _next_name(self, run: Run) -> str:
        taken = {variant.name for variant in variants(run, self.verb)}
        return next(name for n in range(1, len(taken) + 2) if (name := f"{self.verb}-{n}") not in taken)

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        self._form = Form(self.config_class, self._initial, first=self.first)
        on: dict[str, Any] = {"act": self._clicked, "run": self._choose, "tune": self._tune, "cancel": self._cancel}
        self._source, self._button, self._results = Surface(on=on), Surface(on=on), Surface(on=on)
        left = box("wb-column", [self._source, self._form, self._button])
        frame = self._frame(box("wb-split", [left, box("wb-column", [self._results])]), self._code("The button runs this code"))
        self._refresh()
        self._form.on_change(lambda config: self._refresh())
        self._watch()
        return frame

    def _summary(self) -> Html:
        made = variants(self.run, self.verb)[:5] if self.run is not None else []
        return text(self._section(variant) for variant in made) if made else tag("p", self.empty) + tag("pre", self.code)

    def _refresh(self) -> None:
        form = self._form
        assert form is not None
        runs = trained()
        if self.run is not None and all(run.path != self.run.path for run in runs):
            runs = [self.run, *runs]
        chosen = str(self.run.path) if self.run is not None else ""
        self._source.html = source(runs, chosen, "source run")
        made = variants(self.run, self.verb) if self.run is not None else []
        running = any(variant.job.status == "running" for variant in made)
        has_model = self.run is not None and (self.run.path / "model.safetensors").exists()
        problem = self._error
        if self.run is not None and not has_model:
            remedy = "Wait until it has finished, or choose another."
            problem = theme.notice(f"The run {self.run.id} has no model yet.", kind="warning", remedy=remedy)
        act = button(self.verb.capitalize(), "act", primary=True, off=not has_model or bool(form.message) or running)
        self._button.html = tag("div", tag("div", tag("span", cls="grow"), act, cls="row"), problem, cls="stack")
        sections = [self._section(variant) for variant in made]
        self._results.html = tag("div", sections, cls="wb-variants") if sections else theme.empty(self.empty)
        self._show_code()

    def _section(self, variant: Variant) -> Html:
        """One variant: how it was made, and how it compares with the original."""
        if not (variant.path / STARTED).exists():  # made by code, not by this panel
            return tag("section", theme.heading("finished", variant.name, title=str(variant.path)), cls="stack")
        job, status = variant.job, variant.job.status
        action = None
        if status == "running":
            action = button("Cancel", "cancel", value=variant.name)
        elif variant.ready and self.tunable and self._on_tune is not None:
            action = button("Fine-tune", "tune", value=variant.name, title="Train this model further")
        return job_section(job, variant.name, action)

    # -- actions ---------------------------------------------------------------------------------------------------

    def _clicked(self, _value: Any, _values: Mapping[str, Any]) -> None:
        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh()

        self._error = Html()
        self._do(self.act, fail)

    def _choose(self, value: Any, _values: Mapping[str, Any]) -> None:
        self._do(lambda: self.attach(Run.open(str(value))), lambda error: None)

    def _tune(self, value: Any, _values: Mapping[str, Any]) -> None:
        if self._on_tune is not None and self.run is not None:
            self._on_tune(Variant(self.run, str(value)).path)

    def _cancel(self, value: Any, _values: Mapping[str, Any]) -> None:
        if self.run is not None:
            self._do(Variant(self.run, str(value)).job.cancel, lambda error: None)

    def _watch(self) -> None:
        """Redraw while a job runs."""
        with self._lock:
            if self._view is None and self._form is None or self._closed.is_set():
                return
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._look, name=f"{self.verb}-watch", daemon=True)
                self._watcher.start()

    def _look(self) -> None:
        while not self._closed.is_set():
            running = self.run is not None and any(v.job.status == "running" for v in variants(self.run, self.verb))
            self._refresh()
            if not running or self._closed.wait(PERIOD):
                return


def source(runs: Iterable[Run], chosen: str, label: str) -> Html:
    """A drop-down of runs that sends ``run``."""
    options = [(str(run.path), run.id) for run in runs]
    return tag("label", tag("span", label, cls="quiet small"), select(options, chosen, "run", label), cls="wb-source")


def job_section(job: Job, name: str, action: Html | None, more: Callable[[list[dict[str, Any]]], Html] | None = None) -> Html:
    """A job that measures models: its state, then the table and the warnings; ``more`` is drawn from the rows below them."""
    took = tag("span", theme.duration(job.seconds), cls="quiet small keep")
    head = theme.heading(job.status, name, took, action, title=str(job.folder))
    if job.status == "running":
        return tag("section", head, tag("progress", aria_label="Working"), cls="stack")
    result = job.result
    rows = result.get("rows") or []
    warnings = [theme.notice(words, kind="warning") for words in result.get("warnings", [])]
    drawn = more(rows) if more is not None and rows else None
    return tag("section", head, before_after(rows) if rows else None, warnings, drawn, job.problem(), cls="stack")


def before_after(rows: list[dict[str, Any]]) -> Html:
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


def preamble(run: Run, *names: str) -> str:
    """Imports, ``run`` and its held-out batches."""
    imported = ", ".join(sorted({"Run", "compare", *names}))
    return IMPORTS.format(names=imported) + "\n" + LOAD.format(open=open_code(run))
