"""A run and its folder. The folder is the truth; a :class:`Run` reads it, in any process, at any time.

``Run.open(path)`` never imports user code and never writes, except to post a command. :func:`launch` starts a config in
fresh processes. What the engine writes goes through :class:`workbench.training.recorder.Recorder`.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from workbench import events, launcher, storage
from workbench.config import Config, load_yaml
from workbench.errors import RunError, WorkbenchError
from workbench.registry import load_object

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

TERMINAL = ("finished", "stopped", "failed", "lost")
COMMANDS = ("stop", "pause", "resume", "save", "set")
STALE_HEARTBEAT = 20.0
"""Seconds without a heartbeat after which a run on another host counts as lost."""


def runs_folder() -> Path:
    """Where runs lie: ``WORKBENCH_RUNS``, by default ``./runs``."""
    return Path(os.environ.get("WORKBENCH_RUNS") or "runs").expanduser().resolve()


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


class Run:
    """A run folder, read live.

    Example:
        >>> run = Run.open("runs/20261121-193012-resnet20-digits-3f2a")
        >>> run.status, run.progress.step
        ('running', 120)
        >>> run.history[["step", "loss"]].tail()
        >>> run.set(lr=0.01)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = _JournalReader(path / "events")
        self._segments: dict[str, tuple[set[str], list[tuple[int, int, Any]]]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Run({self.path.name!r}, status={self.status!r}, step={self.progress.step})"

    @property
    def id(self) -> str:
        return self.path.name

    # -- making and finding ---------------------------------------------------------------------------------------

    @classmethod
    def create(cls, config: Config, *, label: str = "run", root: str | os.PathLike[str] | None = None) -> Self:
        """A new folder for ``config``, not yet started.

        Raises:
            RunError: the folder cannot be made.
        """
        parent = Path(root).resolve() if root is not None else runs_folder()
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)[:60]
        path = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}-{secrets.token_hex(2)}"
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            for name in ("attempts", "events", "readings", "commands", "checkpoints", "logs", "source"):
                (path / name).mkdir()
        except OSError as error:
            raise RunError(
                f"The run folder {path} cannot be made: {error.strerror}.", "Set WORKBENCH_RUNS to a folder of yours."
            ) from error
        storage.write_atomic(path / "config.yaml", f"kind: {config.kind}\n{config.to_yaml()}")
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run by its path, or by its name under ``WORKBENCH_RUNS``; the start of a name will do if it is unique.

        Raises:
            RunError: there is no such run.
        """
        given = Path(path).expanduser()
        for candidate in (given, runs_folder() / given):
            if (candidate / "config.yaml").is_file():
                return cls(candidate.resolve())
        matches = [p.parent for p in runs_folder().glob(f"{given.name}*/config.yaml")] if given.name == str(path) else []
        if len(matches) == 1:
            return cls(matches[0].resolve())
        detail = f"{len(matches)} runs start so" if matches else "no config.yaml there"
        raise RunError(
            f"There is no run {str(path)!r} ({detail}).", f"Runs lie under {runs_folder()}; `workbench runs` lists them."
        )

    @classmethod
    def all(cls, root: str | os.PathLike[str] | None = None) -> list[Self]:
        """Every run, newest first."""
        parent = Path(root) if root is not None else runs_folder()
        # The name tells the second; runs made within one are told apart by when their config was written.
        configs = sorted(parent.glob("*/config.yaml"), key=lambda p: (p.parent.name[:15], p.stat().st_mtime_ns), reverse=True)
        found = [path.parent for path in configs]
        return [cls(path.resolve()) for path in found]

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The config as given, e.g. a :class:`workbench.TrainConfig`."""
        values = load_yaml((self.path / "config.yaml").read_text(), str(self.path / "config.yaml"))
        kind = values.pop("kind")
        return load_object(KINDS[kind])(**values)

    @property
    def resolved(self) -> dict[str, Any]:
        """What each ``auto`` became and why; empty until the run has started."""
        path = self.path / "resolved.yaml"
        return load_yaml(path.read_text(), str(path)) if path.exists() else {}

    @property
    def events(self) -> list[events.Event]:
        """Everything rank 0 said that still counts: steps undone by a restart are left out."""
        return self._journal.valid()

    @property
    def status(self) -> str:
        """``created``, ``starting``, ``running``, ``paused``, ``hung``, ``finished``, ``stopped``, ``failed`` or ``lost``.

        ``lost``: its processes are gone without a word (``resume()`` goes on from the last checkpoint); ``hung``: they live,
        but no step has ended for far longer than steps take.
        """
        attempt = launcher.Attempt.latest(self.path)
        if attempt is None:
            return "created"
        said = [e for e in self._journal.all() if e.attempt == attempt.number]
        heartbeat = launcher.Heartbeat.read(self.path)
        if heartbeat is not None and heartbeat.attempt != attempt.number:
            heartbeat = None
        for event in reversed(said):
            if event.type in ("finished", "stopped", "failed"):
                return event.type
            if event.type in ("attempt_started", "paused", "resumed"):
                break
        if attempt.ended:
            return "failed"  # it could not even say so: a full disk
        process = heartbeat.process if heartbeat else attempt.process
        alive = process.alive()
        if alive is None:
            alive = heartbeat is not None and time.time() - heartbeat.time < STALE_HEARTBEAT
        if not said:
            return "starting" if alive or attempt.process.alive() else "failed"
        if not alive:
            return "failed" if self._journal.failures(attempt.number) else "lost"
        if next((e.type for e in reversed(said) if e.type in ("paused", "resumed")), "") == "paused":
            return "paused"
        return "hung" if heartbeat and self._overdue(heartbeat) else "running"

    def _overdue(self, heartbeat: launcher.Heartbeat) -> bool:
        windows = [e for e in self.events if isinstance(e, events.Steps)][-20:]
        pace = [(b.time - a.time) / len(b.loss) for a, b in zip(windows, windows[1:], strict=False) if b.loss]
        return bool(pace) and time.time() - heartbeat.step_time > max(120.0, 50 * statistics.median(pace))

    @property
    def error(self) -> str | None:
        """Why the run failed, in words; None unless it failed."""
        if self.status != "failed":
            return None
        attempt = launcher.Attempt.latest(self.path)
        failures = self._journal.failures(attempt.number) if attempt else []
        if failures:
            return min(failures, key=lambda event: event.time).message  # the first: its peers failed because it did
        printed = launcher.tail(self.path, attempt.number) if attempt else ""
        return f"The worker ended before it could start training. It printed:\n{printed}"

    @property
    def progress(self) -> Progress:
        """Steps done, steps in all, rate, time left."""
        step = epoch = total = 0
        rate = None
        windows: list[events.Steps] = []
        for event in self.events:
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

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: ``step, epoch, loss, lr, samples_per_s``, and each metric of the evaluation after that step."""
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        for event in self.events:
            if isinstance(event, events.Steps):
                for offset, (loss, lr) in enumerate(zip(event.loss, event.lr, strict=True)):
                    step = event.first + offset
                    value = float("nan") if loss is None else loss
                    rows[step] = {
                        "step": step,
                        "epoch": event.epoch,
                        "loss": value,
                        "lr": lr,
                        "samples_per_s": event.samples_per_s,
                    }
            elif isinstance(event, events.Evaluated) and event.step in rows:
                rows[event.step].update(event.metrics)
        frame = pd.DataFrame([rows[step] for step in sorted(rows)])
        for column in ("step", "epoch", "loss", "lr", "samples_per_s", "accuracy"):
            if column not in frame:
                frame[column] = pd.Series(dtype="int64" if column in ("step", "epoch") else "float64")
        return frame

    def readings(self, kind: str) -> pd.DataFrame:
        """What a probe read, all ranks: ``"gradients"``, ``"activations"`` or ``"memory"``; one row a step, rank and layer.

        Raises:
            RunError: no probe of that name has written anything, though others have.
        """
        import pandas as pd

        folder = self.path / "readings"
        with self._lock:
            seen, parts = self._segments.setdefault(kind, (set(), []))
            parts.extend(storage.read_segments(folder, kind, seen))
            parts = list(parts)
        if not parts:
            kinds = sorted({p.name.rsplit("-", 3)[0] for p in folder.glob("*.arrow")})
            if kinds and kind not in ("gradients", "activations", "memory"):
                raise RunError(f"This run has no readings named {kind!r}.", f"It has: {', '.join(kinds)}.")
            return pd.DataFrame({"step": pd.Series(dtype="int64"), "rank": pd.Series(dtype="int64")})
        limit = self._journal.limits()
        frames = []
        for attempt, rank, table in parts:
            frame = table.to_pandas()
            frame.insert(1, "rank", rank)
            frames.append(frame[frame["step"] <= limit.get(attempt, float("inf"))])
        return pd.concat(frames, ignore_index=True).sort_values(["step", "rank"], kind="stable", ignore_index=True)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation."""
        return next((e.metrics for e in reversed(self.events) if isinstance(e, events.Evaluated)), {})

    @property
    def findings(self) -> list[events.Finding]:
        """What was noticed about the run, in words."""
        return [e for e in self.events if isinstance(e, events.Finding)]

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir() and p.suffix != ".tmp"]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def load_model(self, device: str = "cpu") -> nn.Module:
        """The trained model, in evaluation mode.

        Raises:
            RunError: the run has not finished, so there is no model yet.
        """
        if not (self.path / "model.safetensors").exists():
            raise RunError(f"The run {self.id} has no model yet (status: {self.status}).", "Wait for it, or resume it.")
        return load_object("workbench.artefact:load_model")(self.path, device=device)  # by name: models lie in a later layer

    def wait(self, timeout: float | None = None, *, check: bool = True) -> Self:
        """Block until the run ends.

        Args:
            timeout: seconds; None waits for ever.
            check: raise when it failed or was lost.

        Raises:
            RunError: it failed or was lost (``check``), or is still going after ``timeout``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.status) not in TERMINAL:
            if deadline is not None and time.monotonic() > deadline:
                raise RunError(f"The run {self.id} is still {status} after {timeout} s.", "Wait longer, or stop it.")
            time.sleep(0.1)
        if check and status == "failed":
            raise RunError(f"The run {self.id} failed: {self.error}")
        if check and status == "lost":
            raise RunError(f"The processes of the run {self.id} are gone.", "resume() goes on from its last checkpoint.")
        return self

    # -- commands -------------------------------------------------------------------------------------------------

    def command(self, name: str, **settings: float) -> str:
        """Post a command for the trainer to apply at a step's end; returns the command's id at once.

        Raises:
            RunError: there is no such command, or no process to obey it.
        """
        if name not in COMMANDS:
            raise RunError(f"There is no command {name!r}.", f"Commands: {', '.join(COMMANDS)}.")
        status = self.status
        if status in TERMINAL or status == "created":
            raise RunError(
                f"The run {self.id} is {status}, so it cannot {name}.",
                "resume() starts it again." if status != "finished" else "",
            )
        identifier = f"{time.time_ns():020d}-{secrets.token_hex(3)}"
        content = json.dumps({"id": identifier, "name": name, "settings": settings})
        storage.write_atomic(self.path / "commands" / f"{identifier}.json", content)
        return identifier

    def pause(self) -> None:
        """Wait at the next step boundary until resumed."""
        self.command("pause")

    def stop(self) -> None:
        """Save a checkpoint and end; the run can be resumed later."""
        self.command("stop")

    def save(self) -> None:
        """Save a checkpoint now."""
        self.command("save")

    def set(self, **settings: float) -> None:
        """Change settings of the running optimizer, e.g. ``lr=0.01``: the schedule goes on scaled to the new peak rate."""
        allowed = {"lr", "weight_decay"}
        for name, value in settings.items():
            if name not in allowed:
                raise RunError(f"{name!r} cannot be changed while training.", f"What can: {', '.join(sorted(allowed))}.")
            if not value >= 0 or value == float("inf"):
                raise RunError(f"{name}={value} must be a finite number of at least 0.")
        self.command("set", **settings)

    def resume(self, nproc: int | None = None) -> Self:
        """Go on: a paused run continues, one that stopped, failed or was lost starts again from its last checkpoint.

        Args:
            nproc: processes of the new start; by default as many as before.

        Raises:
            RunError: the run has finished.
        """
        status = self.status
        if status == "paused":
            self.command("resume")
        elif status in ("stopped", "failed", "lost", "created"):
            last = launcher.Attempt.latest(self.path)
            patience = time.monotonic() + 10  # ranks that have said their last word take a moment to part
            while status in ("stopped", "failed") and launcher.at_work(self.path) and time.monotonic() < patience:
                time.sleep(0.05)
            if status == "lost" and last is not None and last.process.alive():
                launcher.terminate(last.process)  # torchrun, whose rank 0 is gone: the other ranks must not write on
            launcher.spawn(self.path, nproc or (last.nproc if last else 1))
        elif status == "finished":
            raise RunError(f"The run {self.id} has finished.", "Train further by a new run with model={'name': '<this run>'}.")
        return self

    def kill(self) -> None:
        """End the run's processes at once; its folder stays readable and resumable."""
        heartbeat, attempt = launcher.Heartbeat.read(self.path), launcher.Attempt.latest(self.path)
        own = launcher.Process.current()
        for process in {attempt.process if attempt else None, heartbeat.process if heartbeat else None} - {None, own}:
            launcher.terminate(process)  # type: ignore[arg-type]


KINDS: Mapping[str, str] = {"train": "workbench.training.config:TrainConfig"}
"""Configs that a run folder may hold; a name outside this map is never imported."""


Replay = list[tuple[int, str, dict[str, float]]]
"""Commands to apply after given steps, e.g. ``[(120, "set", {"lr": 0.01})]``, as ``repro.py`` gives them."""


def launch(
    config: Config,
    nproc: int = 1,
    *,
    model: nn.Module | None = None,
    root: str | os.PathLike[str] | None = None,
    replay: Replay | None = None,
) -> Run:
    """Start ``config`` in ``nproc`` fresh processes and return at once.

    The processes share nothing with this one: they outlive it, and it does not matter what it did with the accelerator.

    Args:
        config: what to run.
        nproc: processes on this machine, one per accelerator.
        model: train this module instead of building ``config.model``; it is stored in the run folder.
        root: parent of the run folder; by default ``WORKBENCH_RUNS``.
        replay: commands to apply after given steps.

    Raises:
        RunError: the run folder cannot be made, or ``nproc`` is below 1.
    """
    if nproc < 1:
        raise RunError(f"nproc={nproc} must be at least 1.", "One process drives one accelerator.")
    run: Run = load_object("workbench.training:prepare")(config, model=model, root=root, replay=replay)
    launcher.spawn(run.path, nproc)
    return run


class _JournalReader:
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
