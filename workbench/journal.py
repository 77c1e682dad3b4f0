"""Reading what a run wrote: events from its journals, readings from its segments, what still counts after a restart.

An attempt that started again from step *n* undid what earlier attempts did after *n*: :meth:`JournalReader.limits` says up to
which step each attempt counts, and both readers drop the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
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


def progress_of(said: Iterable[events.Event]) -> Progress:
    """How far a run is, from its events."""
    step = epoch = total = 0
    rate = None
    windows: list[events.Steps] = []
    for event in said:
        if isinstance(event, events.AttemptStarted):
            total, step = event.total_steps, event.step
            windows.clear()
        elif isinstance(event, events.Steps):
            step, epoch = event.step, event.epoch
            rate = event.samples_per_s or rate
            windows.append(event)
    eta = None
    if len(windows) > 1 and total:
        recent = windows[-20:]
        elapsed = recent[-1].time - recent[0].time
        eta = (total - step) * elapsed / max(1, recent[-1].step - recent[0].step)
    return Progress(step, total, epoch, rate, eta)


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


class JournalReader:
    """Events of rank 0, parsed once, from a byte cursor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "rank-00000.jsonl"
        self._cursor = 0
        self._events: list[events.Event] = []
        self._lock = threading.Lock()

    def all(self) -> list[events.Event]:
        """Every event so far; a new list, which the caller may keep while other threads read on."""
        with self._lock:
            lines, cursor = storage.read_lines(self._path, self._cursor)
            self._events += _parsed(lines, self._path)
            self._cursor = cursor
            return list(self._events)

    def failures(self, attempt: int) -> list[events.Failed]:
        """Why an attempt failed, as each rank saw it."""
        said = self.all()
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            if path != self._path:
                said += _parsed(storage.read_lines(path)[0], path)
        return [event for event in said if isinstance(event, events.Failed) and event.attempt == attempt]

    def limits(self) -> dict[int, float]:
        """By attempt, the last step that still counts: a later attempt that started earlier undid what came after."""
        starts = [(e.attempt, e.step) for e in self.all() if e.type == "attempt_started"]
        return {attempt: min((s for a, s in starts if a > attempt), default=float("inf")) for attempt, _ in starts}

    def valid(self) -> list[events.Event]:
        everything, limits = self.all(), self.limits()
        return [e for e in everything if e.step <= limits.get(e.attempt, float("inf"))]


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
