"""The training panel: a form, Start, and the run that came of it, live.

:class:`TrainPanel` starts runs with ``launch`` (processes of their own) and follows one run's folder. Everything it shows of a
run is read from there, so a panel made anew, after a restart of the kernel or on another day, finds the run and its history.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets

from widgets import elsewhere, theme
from widgets.follow import Follower
from widgets.form import Form
from widgets.job import execute
from widgets.live_plot import LivePlot
from widgets.markup import Html, button, tag
from widgets.panel import Panel, box, newest, open_code
from widgets.surface import Surface
from workbench import events
from workbench.config import Config
from workbench.errors import ConfigError, WorkbenchError
from workbench.run import TERMINAL, Run
from workbench.training.config import TrainConfig

FIRST = ("data.name", "model.name", "optim.name", "optim.lr", "epochs", "data.batch_size", "precision")
"""What most people change; the other settings are folded."""

HELD_OUT = frozenset(("val_loss", "loss"))
"""Metrics drawn beside the training loss."""

COUNTS = {
    "nproc": ("processes", 1, "Processes on this machine, one per accelerator"),
    "restarts": ("restarts", 0, "How often all start again from the last checkpoint after one was lost"),
    "hosts": ("machines", 1, "Machines that train together, each with so many processes"),
}
"""What a launch takes beside its config: label, least value, what it means."""

ACTIONS = {
    "running": ("pause", "stop"),
    "hung": ("pause", "stop"),
    "starting": ("stop",),
    "paused": ("resume", "stop"),
    "stopped": ("resume",),
    "failed": ("resume",),
    "lost": ("resume",),
}


class TrainPanel(Panel):
    """Configure, start and follow training.

    Args:
        config: what the form starts from; by default the config of ``run``, else the defaults.
        run: the run to follow; by default the newest that is still going, else the newest of this very config.

    Example:
        >>> TrainPanel(TrainConfig(epochs=5))
    """

    title = "Train"

    def __init__(self, config: TrainConfig | None = None, run: Run | None = None) -> None:
        super().__init__()
        self.run: Run | None = run if run is not None else find_run(config)
        self._counts = {"nproc": "1", "restarts": "0", "hosts": "1"}
        self._initial = config or _config_of(self.run) or TrainConfig()
        self._form: Form[TrainConfig] | None = None
        self._error, self._busy = Html(), ""
        self._follower: Follower | None = None

    # -- what a user meets -----------------------------------------------------------------------------------------

    @property
    def form(self) -> Form[TrainConfig]:
        """The form; ``panel.form.value`` is the config it describes."""
        _ = self.view
        assert self._form is not None
        return self._form

    @property
    def config(self) -> TrainConfig:
        """The config that Start would train.

        Raises:
            ConfigError: a setting of the form is wrong.
        """
        return self._initial if self._form is None else self._form.value

    @config.setter
    def config(self, config: TrainConfig) -> None:
        self._initial = config
        if self._form is not None:
            self._form.value = config

    @property
    def code(self) -> str:
        try:
            config = self.config.to_code()
        except ConfigError as error:
            return f"# {error}"
        nproc, restarts = self._counts["nproc"], self._counts["restarts"]
        call = f"launch(config, nproc={nproc}" + (f", restarts={restarts})" if int(restarts) else ")")
        return f"from workbench import TrainConfig, launch\n\nconfig = {config}\nrun = {call}\n"

    def start(self) -> None:
        """Do what the Start button does; returns at once."""
        self._act("start", self.code, "Start ran this code")

    def write_script(self, kind: str) -> None:
        """Show what starts the run on several machines by ``torchrun``, ``slurm`` or ``kubernetes``; returns at once."""
        if not kind:
            return
        self._error = Html()

        def write() -> None:
            code = elsewhere.code(self.config.to_code(), kind, self._counts)
            script = execute(code)["script"]
            self._refresh_start()
            self._show_code(script.text, f"{code.splitlines()[-1]} wrote this")

        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh_start()

        self._do(write, fail)

    def attach(self, run: Run) -> None:
        """Follow ``run`` from its first step."""
        self._unfollow()
        with self._lock:
            self.run = run
            if self._view is None:
                return
            self._clear()
            self._follower = Follower(run, self._on_events, self._on_look).start()
        self._turned(run)

    def close(self) -> None:
        self._unfollow()
        super().close()

    def _unfollow(self) -> None:
        if self._follower is not None:
            self._follower.close()
            self._follower.join()

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        self._form = Form(TrainConfig, self._initial, first=FIRST)
        self._form.on_change(lambda config: self._refresh_start())
        counts = {name: self._setter(name) for name in COUNTS}
        starting = {"start": lambda value, values: self.start(), "elsewhere": lambda value, values: self.write_script(value)}
        self._launcher = Surface(on={**starting, **counts})
        actions = {name: self._action(name) for name in ("pause", "resume", "stop", "rate")}
        self._header = Surface(self._header_html("created"), on=actions)
        self._loss = self._own(
            LivePlot(
                {"loss": {"label": "loss", "smooth": 0.8}, "held out": {"label": "held-out loss", "mode": "lines+markers"}},
                label="loss by optimizer step",
                waiting="The loss appears with the first steps",
                height=200,
                static=False,
            )
        )
        self._metric: LivePlot | None = None
        self._metric_names: tuple[str, ...] = ()
        self._points: list[tuple[int, dict[str, float]]] = []
        self._plots = box("wb-plots", [self._loss] if self.run else [])
        left = box("wb-column", [self._form, self._launcher])
        right = box("wb-column", [self._header, self._plots])
        frame = self._frame(box("wb-split", [left, right]), self._code("Start runs this code"))
        self._refresh_start()
        if self.run is not None:
            self._follower = Follower(self.run, self._on_events, self._on_look).start()
        return frame

    def _summary(self) -> Html:
        if self.run is None:
            return super()._summary()
        from widgets.runs import row_of

        row = row_of(self.run)
        return theme.table([row.facts()]) + tag("pre", self.code)

    def _refresh_start(self) -> None:
        form = self._form
        assert form is not None
        wrong = next((f"{path}: {words}" for path, words in form.errors.items() if path), "")
        starting = self._busy == "start"
        nproc, restarts, hosts = (
            tag("label", f"{label} ", self._count_input(name, title), cls="row quiet")
            for name, (label, _, title) in COUNTS.items()
        )
        line = tag(
            "div",
            nproc,
            restarts,
            tag("span", cls="grow"),
            button("Starting…" if starting else "Start training", "start", primary=True, off=bool(form.message) or starting),
            cls="row wb-launch",
        )
        self._launcher.html = tag("div", line, elsewhere.controls(hosts), self._error or theme.notice(wrong), cls="stack")
        self._show_code(title="Start runs this code")

    def _header_html(self, status: str) -> Html:
        run = self.run
        if run is None:
            return theme.empty("No run yet.", "Choose data and model, then start training.")
        progress = run.progress
        actions = [
            button(name.capitalize(), name, off=bool(self._busy), title=f"{open_code(run)}.{name}()")
            for name in ACTIONS.get(status, ())
        ]
        bar = tag("progress", max=1, value=f"{progress.fraction:.4f}", aria_label="Training progress")
        facts = tag("div", tag("span", self._facts(status), cls="quiet small grow"), self._rate(status), cls="row wb-facts")
        return tag(
            "div",
            theme.heading(status, run.id, actions, title=str(run.path)),
            bar if status != "finished" else None,
            facts,
            self._failure(run) if status == "failed" else None,
            cls="stack",
        )

    def _facts(self, status: str) -> str:
        assert self.run is not None
        progress = self.run.progress
        if not progress.total_steps:
            return "preparing"
        facts = [f"step {theme.number(progress.step)} of {theme.number(progress.total_steps)}"]
        if progress.epoch:
            facts.append(f"epoch {progress.epoch}")
        if status == "running" and progress.samples_per_s:
            facts.append(f"{theme.number(round(progress.samples_per_s))} samples/s")
        if status == "running" and progress.eta is not None:
            facts.append(f"{theme.duration(progress.eta)} left")
        return " · ".join(facts)

    @staticmethod
    def _rate(status: str) -> Html | None:
        if status not in ("running", "paused", "hung"):
            return None
        words = {"placeholder": "rate", "aria_label": "New learning rate", "data_enter": "rate"}
        box_ = tag("input", type="text", name="rate", inputmode="decimal", **words)
        return tag(
            "span", box_, button("Set rate", "rate", data_with="rate", title="Set the peak learning rate"), cls="row wb-rate"
        )

    @staticmethod
    def _failure(run: Run) -> Html:
        failed = next((e for e in reversed(run.events) if isinstance(e, events.Failed)), None)
        if failed is None:
            first, _, rest = (run.error or "").partition("\n")
            return theme.notice(first, details=rest)
        return theme.notice(failed.message, details=failed.traceback)

    # -- actions ---------------------------------------------------------------------------------------------------

    def _count_input(self, name: str, title: str) -> Html:
        words = {"data_input": name, "value": self._counts[name], "title": title}
        return tag("input", type="text", name=name, inputmode="numeric", **words)

    def _setter(self, name: str) -> Callable[[Any, Mapping[str, Any]], None]:
        label, least, _ = COUNTS[name]

        def set_count(value: Any, _values: Mapping[str, Any]) -> None:
            text = str(value).strip()
            right = text.isdecimal() and int(text) >= least
            self._error = Html() if right else theme.notice(f"{label}={text!r} must be a whole number of at least {least}.")
            if right:
                self._counts[name] = text
            self._refresh_start()

        return set_count

    def _action(self, name: str) -> Callable[[Any, Mapping[str, Any]], None]:
        def act(_value: Any, values: Mapping[str, Any]) -> None:
            if self.run is None:
                return
            call = f"{name}()"
            if name == "rate":
                try:
                    rate = float(values.get("rate", ""))
                except ValueError:
                    return
                call = f"set(lr={rate!r})"
            code = f"from workbench import Run\n\nrun = {open_code(self.run)}\nrun.{call}\n"
            self._act(name, code, f"{name.capitalize()} ran this code")

        return act

    def _act(self, name: str, code: str, title: str) -> None:
        """Queue ``code``; the panel shows it, and what went wrong with it."""
        _ = self.view
        with self._lock:
            if self._busy == "start":
                return
            self._busy, self._error = name, Html()
        self._refresh_start()

        def work() -> None:
            run = execute(code)["run"]
            self._busy = ""
            if name == "start" or self._follower is None or not self._follower.alive:
                self.attach(run)
            self._refresh_start()
            self._show_code(code, title)

        def fail(error: BaseException) -> None:
            self._busy, self._error = "", theme.error_notice(error)
            self._refresh_start()

        self._do(work, fail)

    # -- following, on the follower's thread -----------------------------------------------------------------------

    def _on_events(self, fresh: Sequence[events.Event], anew: bool) -> None:
        if anew:
            self._clear()
        windows = [e for e in fresh if isinstance(e, events.Steps)]
        if windows:
            steps = list(itertools.chain.from_iterable(range(w.first, w.first + len(w.loss)) for w in windows))
            self._loss.append("loss", steps, [math.nan if x is None else x for w in windows for x in w.loss])
        points = [(e.step, dict(e.metrics)) for e in fresh if isinstance(e, events.Evaluated)]
        for step, metrics in points:
            for name in HELD_OUT.intersection(metrics):
                self._loss.append("held out", step, metrics.pop(name))
        self._points += points
        names = tuple(dict.fromkeys(name for _, metrics in self._points for name in metrics))
        if names != self._metric_names:
            self._new_metric_plot(names)
            points = self._points
        for step, metrics in points:
            for name, value in metrics.items():
                self._metric.append(name, step, value)  # type: ignore[union-attr]

    def _new_metric_plot(self, names: tuple[str, ...]) -> None:
        """A chart of these metrics in place of the last; which there are is known with the first evaluation."""
        before, self._metric_names = self._metric, names
        self._metric = None
        if names:
            traces = {name: {"mode": "lines+markers", "share": name == "accuracy"} for name in names}
            self._metric = LivePlot(traces, label="metrics by step", height=160, static=False)
        self._plots.children = [self._loss, *([self._metric] if self._metric else [])]
        if before is not None:
            before.close()

    def _clear(self) -> None:
        self._loss.clear()
        self._points.clear()
        if self._metric is not None:
            self._metric.clear()
        self._plots.children = [self._loss, *([self._metric] if self._metric else [])]

    def _on_look(self, status: str) -> None:
        self._header.html = self._header_html(status)


def find_run(config: Config | None) -> Run | None:
    """The newest run that is still going; else the newest one of ``config``, or of any config when None."""
    found: Run | None = None
    for run in newest()[:50]:
        try:
            if run.status not in TERMINAL and run.status != "created":
                return run
            if found is None and (config is None or run.config == config):
                found = run
        except (WorkbenchError, OSError, KeyError):
            continue  # a folder that does not open is the run list's to show
    return found


def _config_of(run: Run | None) -> TrainConfig | None:
    try:
        config = run.config if run is not None else None
    except WorkbenchError:
        return None
    return config if isinstance(config, TrainConfig) else None
