"""Training: :func:`train` here and now, :func:`prepare` a folder for :func:`workbench.launch`.

Both run :func:`workbench.training.session.execute` on a run folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench import launcher
from workbench.errors import RunError, WorkbenchError
from workbench.run import Replay, Run
from workbench.storage import dump_object
from workbench.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TrainConfig", "TrainResult", "carry_out", "prepare", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        run: the run folder.
        model: the trained module, on the device it was trained on, in evaluation mode; with ``mesh.devices`` on all of them, and
            it computes as it is.
        metrics: of the last evaluation, e.g. ``{"val_loss": 0.08, "accuracy": 0.98}``.
    """

    run: Run
    model: nn.Module
    metrics: dict[str, float]


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    root: str | os.PathLike[str] | None = None,
    replay: Replay | None = None,
) -> TrainResult:
    """Train in this process, and return when done.

    Args:
        config: what to train.
        model: start from this module instead of building ``config.model``; it is copied, and stays as it is.
        data: ``workbench.data.Splits``, a pair (train, eval) of torch datasets or one torch dataset, in place of ``config.data``.
        root: parent of the run folder; by default ``WORKBENCH_RUNS``.
        replay: commands to apply after given steps, e.g. ``[(120, "set", {"lr": 0.01})]``, as ``repro.py`` gives them.

    Raises:
        WorkbenchError: in words; the run folder says the same.
    """
    run = prepare(config, model=model, data=data, root=root, replay=replay, detached=False)
    return carry_out(run, data=data)


def carry_out(run: Run, *, data: Any = None) -> TrainResult:
    """Train in this process what a run folder holds, from its last checkpoint; keep no memory but that of the model.

    Raises:
        WorkbenchError: in words; its frames are emptied, as a notebook keeps the last error, and with it all they hold.
    """
    from workbench.allocator import forget, give_back
    from workbench.training.session import execute

    attempt = launcher.claim(run.path, 1)
    try:
        trainer = execute(run, attempt, data=data)
    except WorkbenchError as error:
        _drop_graphs(run)
        forget(error)
        raise
    result = TrainResult(run, trainer.model, trainer.metrics)
    del trainer
    _drop_graphs(run)
    give_back()
    return result


def _drop_graphs(run: Run) -> None:
    """Forget what was compiled: captured graphs hold on to all the memory that they were captured with."""
    if run.config.compile != "off":
        import torch

        torch.compiler.reset()


def prepare(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    root: str | os.PathLike[str] | None = None,
    replay: Replay | None = None,
    detached: bool = True,
    nproc: int | None = None,
) -> Run:
    """A run folder, ready to be started.

    Args:
        config: what to train.
        model: stored in the folder as the model to start from.
        data: stored in the folder as the data to train on.
        root: parent of the folder.
        replay: commands to apply after given steps.
        detached: other processes will train, so that everything must be stored; else what cannot be pickled stays with us.
        nproc: how many will, if that is known.

    Raises:
        ConfigError: the mesh is of another number of processes.
        RunError: a file or folder that the config names is missing, or the model or data cannot be stored.
    """
    from workbench.training import repro, sources

    if not isinstance(config, TrainConfig):
        raise RunError(
            f"config is a {type(config).__name__}, not a TrainConfig.", "Build one: TrainConfig(data={'name': 'digits'}, …)."
        )
    if nproc is not None:
        config.mesh.arranged(nproc)
    if model is not None:
        config = config.override({"model.name": sources.model_name(model)})
    if data is not None:
        config = config.override({"data.name": sources.DATA_OBJECT})
    given = config.distill.teacher if config.distill is not None else None
    if given is not None:
        config = config.override({"distill.teacher": sources.teacher_name(given)})
    run = Run.create(config, label=config.title, root=root)
    sources.copy_sources(config, run.path)
    if given is not None:
        sources.keep_teacher(given, run.path)
    if model is not None:
        sources.keep_model(model, run.path)
    if data is not None:
        try:
            dump_object(data, run.path / sources.DATA_OBJECT)
        except RunError:
            if detached:
                raise
    if replay:
        sources.write_replay(run.path, replay)
    repro.write_code(run.path, config)
    return run
