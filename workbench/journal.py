"""Reading what a run wrote: events from its journals, readings from its segments, what still counts after a restart.

An attempt that started again from step *n* undid what earlier attempts did after *n*: :meth:`JournalReader.limits` says up to
which step each attempt counts, and both readers drop the rest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from workbench import events, storage
from workbench.errors import RunError, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``eta`` is in seconds, None before the rate is known."""

    step: int
    total_steps: int
    epoch: int
    samples_per_s: float | None
    eta: float | None

    @property
    def fraction(self) -> float:
        return self.step / self.total_steps if self.total_steps else 0.0


class _Meter:
    """How far a run is, from its events one after another."""

    def __init__(self) -> None:
        self._step = self._epoch = self._total = 0
        self._rate: float | None = None
        self._windows: deque[events.Steps] = deque(maxlen=20)

    def take(self, event: events.Event) -> None:
        if isinstance(event, events.AttemptStarted):
            self._total, self._step = event.total_steps, event.step
            self._windows.clear()
        elif isinstance(event, events.Steps):
            self._step, self._epoch = event.step, event.epoch
            self._rate = event.samples_per_s or self._rate
            self._windows.append(event)

    def progress(self) -> Progress:
        eta, windows = None, self._windows
        if len(windows) > 1 and self._total:
            elapsed = windows[-1].time - windows[0].time
            eta = (self._total - self._step) * elapsed / max(1, windows[-1].step - windows[0].step)
        return Progress(self._step, self._total, self._epoch, self._rate, eta)


def history_of(said: Iterable[events.Event]) -> pd.DataFrame:
    """Losses, rates and metrics by step, from a run's events."""
    import pandas as pd

    rows: dict[int, dict[str, Any]] = {}
    for event in said:
        if isinstance(event, events.Steps):
            shared = {"epoch": event.epoch, "samples_per_s": event.samples_per_s}
            for step, (loss, lr) in enumerate(zip(event.loss, event.lr, strict=True), start=event.first):
                rows[step] = {"step": step, "loss": float("nan") if loss is None else loss, "lr": lr, **shared}
        elif isinstance(event, events.Evaluated) and event.step in rows:
            rows[event.step].update(event.metrics)
    frame = pd.DataFrame([rows[step] for step in sorted(rows)])
    numbers = dict.fromkeys(("loss", "lr", "samples_per_s", "accuracy"), "float64")
    kinds = {"step": "int64", "epoch": "int64", **numbers}
    for column, kind in kinds.items():
        if column not in frame:
            frame[column] = pd.Series(dtype=kind)
    return frame[[*kinds, *(column for column in frame if column not in kinds)]]


class ReadingsReader:
    """Readings of all ranks, each table read once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._segments = folder, storage.SegmentReader(folder)
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        self._lock = threading.Lock()

    def frame(self, kind: str, limits: dict[int, float]) -> pd.DataFrame:
        """One row a step, rank and layer.

        Args:
            kind: name of the probe.
            limits: by attempt, the last step that still counts.

        Raises:
            RunError: nothing of that name was written, though others were.
        """
        import pandas as pd

        with self._lock:
            parts = self._parts.setdefault(kind, [])
            parts.extend(self._segments.read(kind))
            parts = list(parts)
        if not parts:
            kinds = sorted({p.name.rsplit("-", 3)[0] for p in self._folder.glob("*.arrows")})
            if kinds and kind not in ("gradients", "activations", "memory", "communication"):
                raise RunError(f"This run has no readings named {kind!r}.", f"It has: {', '.join(kinds)}.")
            return pd.DataFrame({"step": pd.Series(dtype="int64"), "rank": pd.Series(dtype="int64")})
        frames = []
        for attempt, rank, table in parts:
            frame = table.to_pandas()
            frame.insert(1, "rank", rank)
            frames.append(frame[frame["step"] <= limits.get(attempt, float("inf"))])
        return pd.concat(frames, ignore_index=True).sort_values(["step", "rank"], kind="stable", ignore_index=True)


TURNS = ("attempt_started", "paused", "resumed", "finished", "stopped", "failed")
"""Events after which a run stands otherwise than before."""


class JournalReader:
    """Events of rank 0, parsed once, from a byte cursor. What is asked of it costs what is new, not what there is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "rank-00000.jsonl"
        self._cursor = 0
        self._events: list[events.Event] = []
        self._turns: list[events.Event] = []
        self._valid: list[events.Event] = []
        self._limits: dict[int, float] = {}
        self._meter = _Meter()
        self._lock = threading.Lock()

    def all(self) -> list[events.Event]:
        """Every event so far; a new list, which the caller may keep while other threads read on."""
        with self._lock:
            self._read()
            return list(self._events)

    def turns(self, attempt: int) -> tuple[list[events.Event], bool]:
        """An attempt's events of :data:`TURNS`, and whether it has said anything at all."""
        with self._lock:
            self._read()
            said = any(event.attempt == attempt for event in reversed(self._events))
            return [event for event in self._turns if event.attempt == attempt], said

    def failures(self, attempt: int) -> list[events.Failed]:
        """Why an attempt failed, as each rank saw it."""
        said = self.all()
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            if path != self._path:
                said += _parsed(storage.read_lines(path)[0], path)
        return [event for event in said if isinstance(event, events.Failed) and event.attempt == attempt]

    def limits(self) -> dict[int, float]:
        """By attempt, the last step that still counts: a later attempt that started earlier undid what came after."""
        with self._lock:
            self._read()
            return dict(self._limits)

    def valid(self) -> list[events.Event]:
        """Events that still count, a new list."""
        with self._lock:
            self._read()
            return list(self._valid)

    def latest_steps(self, count: int) -> list[events.Steps]:
        """The last windows of steps that still count, at most so many."""
        with self._lock:
            self._read()
            return [*islice((event for event in reversed(self._valid) if isinstance(event, events.Steps)), count)][::-1]

    def progress(self) -> Progress:
        with self._lock:
            self._read()
            return self._meter.progress()

    def _read(self) -> None:
        """Take in what is new. The caller holds the lock."""
        lines, cursor = storage.read_lines(self._path, self._cursor)
        fresh = _parsed(lines, self._path)
        self._cursor = cursor
        self._events += fresh
        self._turns += [event for event in fresh if event.type in TURNS]
        if any(isinstance(event, events.AttemptStarted) for event in fresh):
            starts = [(event.attempt, event.step) for event in self._turns if isinstance(event, events.AttemptStarted)]
            self._limits = {
                attempt: min((step for number, step in starts if number > attempt), default=float("inf")) for attempt, _ in starts
            }
            self._valid, self._meter, fresh = [], _Meter(), self._events  # what was counted may count no longer
        counted = [event for event in fresh if event.step <= self._limits.get(event.attempt, float("inf"))]
        self._valid += counted
        for event in counted:
            self._meter.take(event)


def _parsed(lines: list[bytes], path: Path) -> list[events.Event]:
    """Events of a journal's lines; kinds that only a newer workbench knows are passed over."""
    found: list[events.Event] = []
    for line in lines:
        try:
            found.append(events.EVENT.validate_json(line))
        except ValidationError as error:
            if error.errors()[0]["type"] == "union_tag_invalid":
                continue
            raise WorkbenchError(f"{path} holds a line that is not an event: {line[:80]!r}.", str(error)) from error
    return found
