"""Runs on a terminal: :class:`Display` follows one, :func:`runs_table` lists them, :func:`show_run` describes one.

What runs and users name is printed as it is: rich's markup is off for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from workbench import events
from workbench.diagnosis import findings_of
from workbench.run import TERMINAL, Run

COLOURS = {"finished": "green", "running": "cyan", "starting": "cyan", "paused": "yellow", "stopped": "yellow"}


class Display:
    """A run's progress: a bar on a terminal, a line per evaluation elsewhere (a log, a pipe).

    Example:
        >>> with Display(run) as display:
        ...     status = display.watch()
    """

    def __init__(self, run: Run, console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console(highlight=False)
        self._seen = 0
        self._losses: list[float] = []
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=60,
        )
        self._task = self._progress.add_task("starting", total=None, facts="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    def watch(self, every: float = 0.2) -> str:
        """Follow until the run ends; its status then."""
        while True:
            status = self.run.status  # before the events, so that the last of them are not missed
            self.refresh(status)
            if status in TERMINAL:
                return status
            time.sleep(every)

    def refresh(self, status: str) -> None:
        """Draw what is new."""
        said = self.run.events
        for event in said[self._seen :] if self._seen <= len(said) else []:
            if isinstance(event, events.Evaluated) and not self.console.is_terminal:
                self.say(f"epoch {event.epoch}  step {event.step}  loss {self._loss(said):.4f}  {_facts(event.metrics)}")
            elif isinstance(event, events.Finding):
                self.say(f"{event.severity}: {event.message}")
        self._seen = len(said)
        progress = self.run.progress
        facts = f"loss {self._loss(said):.4f}  {_facts(self.run.metrics)}"
        if progress.samples_per_s:
            facts += f"  {progress.samples_per_s:,.0f} samples/s"
        self._progress.update(
            self._task,
            description=f"{status}, epoch {progress.epoch}" if progress.epoch else status,
            completed=progress.step,
            total=progress.total_steps or None,
            facts=facts if progress.step else "",
        )

    @staticmethod
    def _loss(said: Sequence[events.Event]) -> float:
        last = next((e.loss[-1] for e in reversed(said) if isinstance(e, events.Steps)), None)
        return float("nan") if last is None else last


def runs_table(runs: Sequence[Run], console: Console | None = None) -> None:
    """One row a run."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "status", "step", "metrics"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("run", "status"))
    for run in runs:
        progress, status = run.progress, run.status
        steps = f"{progress.step}/{progress.total_steps}" if progress.total_steps else "–"
        table.add_row(Text(run.id), Text(status, COLOURS.get(status, "red")), steps, Text(_facts(run.metrics)))
    (console or Console()).print(table)


def show_run(run: Run, console: Console | None = None) -> None:
    """What was asked for, what became of it, what was decided and found."""
    out = console or Console(highlight=False, soft_wrap=True)
    progress, config = run.progress, run.config
    out.print(Text(run.id, "bold"), Text(run.status, COLOURS.get(run.status, "red")))
    out.print(Text(str(run.path)))
    _section(out, "progress", {"step": f"{progress.step} of {progress.total_steps}", "epoch": progress.epoch, **run.metrics})
    if run.error:
        _section(out, "error", {"": run.error})
    _section(out, "settings that are not defaults", config.changes_from(type(config)()))
    _section(out, "decided", {name: f"{made['value']} ({made['reason']})" for name, made in run.resolved.items()})
    _section_of_findings(out, findings_of(run))
    _section(out, "checkpoints", {path.name: path for path in run.checkpoints})


def _section_of_findings(out: Console, findings: Sequence[events.Finding]) -> None:
    if findings:
        out.print(Text("\nfindings", "bold"))
    for finding in findings:
        out.print(Text(f"  {finding.severity} at step {finding.step}: {finding.name}. {finding.message}"))
        for number, remedy in enumerate(finding.remedies):
            overrides = " ".join(f"{name}={value}" for name, value in remedy.items())
            out.print(Text(f"    {'or' if number else 'try'} {overrides}"))


def _section(out: Console, title: str, facts: dict[str, Any]) -> None:
    if facts:
        out.print(Text(f"\n{title}", "bold"))
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            out.print(Text(f"  {name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}"))


def _facts(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
