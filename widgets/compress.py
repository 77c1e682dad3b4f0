"""What the pruning and quantization panels share: a source run, a form, a job, and the variants made so far.

A variant is a folder ``variants/NAME`` inside its run: the model, the code that made it, and how it compares with the original.
:func:`variants` lists them; :class:`CompressPanel` makes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets

from widgets import theme
from widgets.form import Form
from widgets.job import CODE, STARTED, Job
from widgets.panel import Panel, box, open_code
from widgets.surface import Surface
from workbench.config import Config
from workbench.errors import ConfigError, RunError
from workbench.run import Run

PERIOD = 0.5
"""Seconds between two looks at a job that runs."""

LOAD = """\
run = {open}
model = run.load_model()
batches = Batches(load_splits(run.config.data, root=run.path), run.config.data, Shard(), Target(torch.device("cpu")), run.config.seed)
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


def trained(root: Path | None = None) -> list[Run]:
    """Runs that have a model."""
    return [run for run in Run.all(root) if (run.path / "model.safetensors").exists()]


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
        self._error = ""
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

    def _summary(self) -> str:
        if self.run is None:
            return f"<p>{escape(self.empty)}</p>"
        parts = [self._variant_html(variant) for variant in variants(self.run, self.verb)[:5]]
        return "".join(parts) or f"<p>{escape(self.empty)}</p><pre>{escape(self.code)}</pre>"

    def _refresh(self) -> None:
        form = self._form
        assert form is not None
        runs = trained()
        chosen = self.run.path if self.run is not None else None
        if chosen is not None and all(run.path != chosen for run in runs):
            runs = [self.run, *runs]  # type: ignore[list-item]
        options = "".join(
            f'<option value="{escape(str(r.path), True)}"{" selected" if r.path == chosen else ""}>{escape(r.id)}</option>' for r in runs
        )
        self._source.html = (
            f'<label class="wb-source"><span class="quiet small">source run</span><select data-input="run" value="{escape(str(chosen or ""), True)}">'
            f"{options}</select></label>"
        )
        running = any(v.job.status == "running" for v in variants(self.run, self.verb)) if self.run is not None else False
        has_model = self.run is not None and (self.run.path / "model.safetensors").exists()
        off = " disabled" if not has_model or form.message or running else ""
        problem = self._error
        if self.run is not None and not has_model:
            problem = theme.notice(f"The run {self.run.id} has no model yet.", kind="warning", remedy="Wait until it has finished, or choose another.")
        self._button.html = (
            f'<div class="stack"><div class="row"><span class="grow"></span><button class="primary" data-action="act"{off}>'
            f"{self.verb.capitalize()}</button></div>{problem}</div>"
        )
        made = variants(self.run, self.verb) if self.run is not None else []
        body = "".join(self._variant_html(variant) for variant in made)
        self._results.html = f'<div class="wb-variants">{body}</div>' if body else f'<div class="wb-empty"><p class="quiet">{escape(self.empty)}</p></div>'
        self._show_code()

    def _variant_html(self, variant: Variant) -> str:
        job, status = variant.job, variant.job.status
        known = (variant.path / STARTED).exists()
        actions = ""
        if status == "running":
            actions = f'<button data-action="cancel" data-value="{escape(variant.name, True)}">Cancel</button>'
        elif variant.ready and self.tunable and self._on_tune is not None:
            actions = f'<button data-action="tune" data-value="{escape(variant.name, True)}" title="Train this model further">Fine-tune</button>'
        head = (
            f'<div class="row wb-head">{theme.chip(status if known else "finished")}<span class="mono grow nowrap" title="{escape(str(variant.path), True)}">'
            f'{escape(variant.name)}</span><span class="quiet small keep">{theme.duration(job.seconds) if known else ""}</span>{actions}</div>'
        )
        if status == "running":
            return f'<section class="stack">{head}<progress aria-label="Working"></progress></section>'
        result = job.result
        body = before_after(result["rows"]) if result.get("rows") else ""
        body += "".join(theme.notice(text, kind="warning") for text in result.get("warnings", []))
        return f'<section class="stack">{head}{body}{job.problem() if known else ""}</section>'

    # -- actions ---------------------------------------------------------------------------------------------------

    def _clicked(self, _value: Any, _values: Mapping[str, Any]) -> None:
        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh()

        self._error = ""
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


def before_after(rows: list[dict[str, Any]]) -> str:
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
    """Imports, the model of ``run`` and its held-out batches."""
    return IMPORTS.format(names=", ".join(sorted({"Run", "compare", "save_model", *names}))) + "\n" + LOAD.format(open=open_code(run))
