"""A run and its folder. The folder is the truth; a :class:`Run` reads it, in any process, at any time.

``Run.open(path)`` never imports user code and never writes, except to post a command. :func:`launch` starts a config in
fresh processes. What the engine writes goes through :class:`workbench.training.recorder.Recorder`.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from workbench import launcher, storage
from workbench.commands import check, post
from workbench.config import Config, load_yaml
from workbench.errors import RunError
from workbench.events import Evaluated, Event, Failed, Finding, ReadingsTimed
from workbench.journal import JournalReader, Progress, ReadingsReader, history_of
from workbench.registry import load_object
from workbench.status import status_of

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

TERMINAL = ("finished", "stopped", "failed", "lost")
FOLDERS = ("attempts", "events", "readings", "commands", "checkpoints", "logs", "source")


def runs_folder() -> Path:
    """Where runs lie: ``WORKBENCH_RUNS``, by default ``./runs``."""
    return Path(os.environ.get("WORKBENCH_RUNS") or "runs").expanduser().resolve()


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
        self._journal = JournalReader(path / "events")
        self._readings = ReadingsReader(path / "readings")

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
            for name in FOLDERS:
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
        kind = values.pop("kind", None)
        if kind not in KINDS:
            raise RunError(f"The run {self.id} is of the unknown kind {kind!r}.", f"This version knows: {', '.join(KINDS)}.")
        return load_object(KINDS[kind])(**values)

    @property
    def resolved(self) -> dict[str, Any]:
        """What each ``auto`` became and why; empty until the run has started."""
        path = self.path / "resolved.yaml"
        return load_yaml(path.read_text(), str(path)) if path.exists() else {}

    @property
    def events(self) -> list[Event]:
        """Everything rank 0 said that still counts: steps undone by a restart are left out."""
        return self._journal.valid()

    @property
    def status(self) -> str:
        """``created``, ``starting``, ``running``, ``paused``, ``hung``, ``finished``, ``stopped``, ``failed`` or ``lost``.

        ``lost``: its processes are gone without a word (``resume()`` goes on from the last checkpoint); ``hung``: they live,
        but no step has ended for far longer than steps take; ``starting``: they are on their way, for the first time or again.
        """
        return status_of(self.path, self._journal)

    @property
    def error(self) -> str | None:
        """Why the run failed, in words; None unless it failed."""
        if self.status != "failed":
            return None
        attempt = launcher.Attempt.latest(self.path)
        if attempt and attempt.failure:
            return attempt.failure
        if attempt and (failures := self.failures(attempt.number)):
            return failures[0].message
        printed = launcher.tail(self.path, attempt.number) if attempt else ""
        return f"The worker ended before it could start training. It printed:\n{printed}"

    def failures(self, attempt: int) -> list[Failed]:
        """What ranks said of an attempt's failure, the first first: its peers failed because it did."""
        return sorted(self._journal.failures(attempt), key=lambda event: event.time)

    @property
    def progress(self) -> Progress:
        """Steps done, steps in all, rate, time left."""
        return self._journal.progress()

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: ``step, epoch, loss, lr, samples_per_s``, and each metric of the evaluation after that step."""
        return history_of(self.events)

    def readings(self, kind: str) -> pd.DataFrame:
        """What a probe read, all ranks; one row a step, rank and layer.

        Args:
            kind: ``"gradients"``, ``"activations"``, ``"memory"``, ``"communication"``, or the name of another probe.

        Raises:
            RunError: no probe of that name has written anything, though others have.
        """
        return self._readings.frame(kind, self._journal.limits())

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation."""
        return next((e.metrics for e in reversed(self.events) if isinstance(e, Evaluated)), {})

    @property
    def overhead(self) -> float:
        """Share of the training time that readings take, as last measured; not a number before, or where it can't be."""
        return next((e.overhead for e in reversed(self.events) if isinstance(e, ReadingsTimed)), math.nan)

    @property
    def findings(self) -> list[Finding]:
        """What was noticed about the run, in words."""
        return [e for e in self.events if isinstance(e, Finding)]

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir() and p.suffix != ".tmp"]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    @property
    def snapshots(self) -> list[Path]:
        """Memory snapshots, by step and rank."""
        found = (self.path / "snapshots").glob("step-*-rank-*.json")
        return sorted(found, key=lambda path: [int(number) for number in path.stem.split("-")[1::2]])

    def load_model(self, device: str = "cpu") -> nn.Module:
        """The trained model, in evaluation mode.

        Raises:
            RunError: the run has not finished, so there is no model yet.
        """
        if not (self.path / "model.safetensors").exists():
            raise RunError(f"The run {self.id} has no model yet (status: {self.status}).", "Wait for it, or resume it.")
        return load_object("workbench.artefact:load_model")(self.path, device=device)  # by name: models lie in a later layer

    def report(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write ``report.html``, a page about this run that needs nothing else, into its folder or to ``path``."""
        return load_object("workbench.report:write_report")(self, path)  # by name: it lies in a later layer

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

    def command(self, name: str, **settings: float | str) -> str:
        """Post a command for the trainer to apply at a step's end; returns the command's id at once.

        Raises:
            RunError: there is no such command or setting, a value is out of range, or there is no process to obey it.
        """
        check(name, settings)
        status = self.status
        if status in TERMINAL or status == "created":
            raise RunError(
                f"The run {self.id} is {status}, so it cannot {name}.",
                "resume() starts it again." if status != "finished" else "",
            )
        return post(self.path, name, settings)

    def pause(self) -> None:
        """Wait at the next step boundary until resumed."""
        self.command("pause")

    def stop(self) -> None:
        """Save a checkpoint and end; the run can be resumed later."""
        self.command("stop")

    def save(self) -> None:
        """Save a checkpoint now."""
        self.command("save")

    def memory_snapshot(self, steps: int = 2) -> None:
        """Have every rank record the allocations of its next ``steps`` steps and write them down, for :attr:`snapshots` to list.

        On a GPU; a run on a CPU says that it can't. ``workbench.memory.snapshot_page`` draws one.

        Raises:
            RunError: no process is there to obey, or ``steps`` is not from 1 to 50.
        """
        self.command("snapshot", steps=steps)

    def set(self, **settings: float | str) -> None:
        """Change settings of the running optimizer after its present step.

        Args:
            lr: the next step's rate; the schedule goes on in proportion.
            peak: the schedule's peak rate, as ``optim.lr`` sets it.
            weight_decay: of what is decayed.
            clip_mode, clip_max_norm: of the gradients, as ``clip.mode`` and ``clip.max_norm`` set them.

        Raises:
            RunError: there is no such setting, its value is out of range, or the run does not train.
        """
        self.command("set", **settings)

    def resume(self, nproc: int | None = None, *, mesh: Mapping[str, Any] | None = None, restarts: int = 0) -> Self:
        """Go on: a paused run continues, one that stopped, failed or was lost starts again from its last checkpoint.

        Args:
            nproc: processes of the new start; by default as many as before.
            mesh: how they share the work from now on, e.g. ``{"shard": 2}``; by default as before. ``{}`` is one copy a process.
            restarts: how often all start again by themselves after one was lost (:func:`launch`).

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
                launcher.terminate(last.process)  # torchrun's agent, whose rank 0 is gone: no other must write on
            arranged = None if mesh is None else _mesh(self.config, mesh)
            launcher.spawn(self.path, nproc or (last.nproc if last else 1), arranged, restarts=restarts)
        elif status == "finished":
            raise RunError(f"The run {self.id} has finished.", "Train further by a new run with model={'name': '<this run>'}.")
        return self

    def kill(self) -> None:
        """End the run's processes at once; its folder stays readable and resumable."""
        heartbeat, attempt = launcher.Heartbeat.read(self.path), launcher.Attempt.latest(self.path)
        own = launcher.Process.current()
        for process in {attempt.process if attempt else None, heartbeat.process if heartbeat else None} - {None, own}:
            launcher.terminate(process)  # type: ignore[arg-type]


def _mesh(config: Any, mesh: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a mesh in full, so that a wrong one is refused before anything starts."""
    full: dict[str, Any] = type(config.mesh)(**mesh).model_dump(mode="json")
    return full


KINDS: Mapping[str, str] = {"train": "workbench.training.config:TrainConfig"}
"""Configs that a run folder may hold; a name outside this map is never imported."""


Replay = list[tuple[int, str, dict[str, Any]]]
"""Commands to apply after given steps, e.g. ``[(120, "set", {"lr": 0.01})]``, as ``repro.py`` gives them."""


def launch(
    config: Config,
    nproc: int = 1,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    root: str | os.PathLike[str] | None = None,
    replay: Replay | None = None,
    restarts: int = 0,
    min_nproc: int | None = None,
) -> Run:
    """Start ``config`` in ``nproc`` fresh processes and return at once.

    The processes share nothing with this one: they outlive it, and it does not matter what it did with the accelerator.

    Args:
        config: what to run.
        nproc: processes on this machine, one per accelerator.
        model: train this module instead of building ``config.model``; it is stored in the run folder.
        data: train on this instead of ``config.data`` (as for :func:`workbench.train`); it is stored in the run folder.
        root: parent of the run folder; by default ``WORKBENCH_RUNS``.
        replay: commands to apply after given steps.
        restarts: how often all start again by themselves, from the last checkpoint, after one was lost.
        min_nproc: the fewest processes to go on with when one cannot be started again, its accelerator broken, say; by default
            all must. The batch stays the same, and the mesh must allow it.

    Raises:
        RunError: the run folder cannot be made, ``nproc`` is below 1, or ``restarts`` or ``min_nproc`` is out of range.
        ConfigError: ``config.mesh`` is of another number of processes.
    """
    if nproc < 1:
        raise RunError(f"nproc={nproc} must be at least 1.", "One process drives one accelerator.")
    if restarts < 0:
        raise RunError(f"restarts={restarts} must be at least 0.")
    if min_nproc is not None and not 1 <= min_nproc <= nproc:
        raise RunError(f"min_nproc={min_nproc} must lie between 1 and nproc={nproc}.")
    run: Run = load_object("workbench.training:prepare")(config, model=model, data=data, root=root, replay=replay, nproc=nproc)
    launcher.spawn(run.path, nproc, restarts=restarts, min_nproc=min_nproc)
    return run
