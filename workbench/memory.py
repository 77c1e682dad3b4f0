"""Memory of training steps: what would fit, what makes it fit, and what holds it.

>>> choice = memory.optimizer(config, budget=8)          # GiB; short real steps are measured
>>> train(config.override(choice.overrides))
>>> memory.largest_batch(config, budget=8).samples

>>> memory.snapshot_page(run)                            # every allocation of some steps, after run.memory_snapshot()

In a run, ``TrainConfig.memory`` does the same: ``recompute="auto"``, ``offload="auto"`` and a ``budget``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError
from workbench.losses import LossConfig, make_loss
from workbench.optim_config import OptimConfig
from workbench.snapshot_page import snapshot_page
from workbench.training.config import TrainConfig
from workbench.training.economy import check_memory
from workbench.training.fitting import GIB, Choice, LargestBatch, Tried, choose, free_for, largest
from workbench.training.memory_config import MemoryConfig
from workbench.training.objective import Objective
from workbench.training.trial import Setting, Trial, trial_of

__all__ = ["Choice", "LargestBatch", "MemoryConfig", "Tried", "largest_batch", "optimizer", "snapshot_page"]


def optimizer(
    model: nn.Module | TrainConfig,
    budget: float | None = None,
    *,
    data: Any = None,
    loss: LossConfig | None = None,
    optim: OptimConfig | None = None,
    precision: str = "fp32",
) -> Choice:
    """The fastest way of keeping a training step under a memory budget, found by running short real steps.

    It chooses among keeping everything, recomputing blocks (as few as fit), and on a GPU keeping activations, the optimizer's
    state or both in main memory. Steps are not compiled. Nothing that is given changes.

    Args:
        model: a config, whose ``data``, ``loss``, ``optim``, ``precision`` and ``accumulate`` count; or a module.
        budget: GiB at the step's peak: weights, gradients, optimizer state and activations; by default nine tenths of what the
            device has free.
        data: with a config, as in :func:`workbench.train`; with a module, a batch (x, y) [N, ...] of the size to train with.
        loss, optim, precision: with a module.

    Raises:
        ConfigError: a module without a batch.
        MemoryExhausted: nothing fits.

    Example:
        >>> choice = optimizer(TrainConfig(model={"name": "resnet50"}, data={"name": "cifar10", "batch_size": 512}), budget=12)
        >>> print(choice.reason)
        >>> choice.table
    """
    trial, setting, samples = _trial(model, data, loss, optim, precision)
    captured = isinstance(model, TrainConfig) and model.compile in ("reduce-overhead", "max-autotune")
    with trial.unchanged():
        limit = free_for(trial) if budget is None else int(budget * GIB)
        return choose(trial, MemoryConfig(recompute="auto", offload="auto"), samples, setting, limit, captured=captured)


def largest_batch(
    model: nn.Module | TrainConfig,
    budget: float | None = None,
    *,
    data: Any = None,
    loss: LossConfig | None = None,
    optim: OptimConfig | None = None,
    precision: str = "fp32",
    memory: MemoryConfig | None = None,
    prove: bool | None = None,
) -> LargestBatch:
    """The most samples of one step (a micro-step's on one rank, where there are several) that fit a memory budget.

    Predicted from a line through steps of small batches, then proved by a real step of that size.

    Args:
        model, budget, data, loss, optim, precision: as in :func:`optimizer`; a batch given with a module may be of any size.
        memory: what saves memory; by default the config's, or nothing.
        prove: run the real step; by default on a GPU, and on a CPU if there is a budget.

    Raises:
        ConfigError: a module without a batch, or something left to auto.
        MemoryExhausted: not one sample fits.
    """
    trial, setting, _ = _trial(model, data, loss, optim, precision)
    if memory is None:
        memory = model.memory if isinstance(model, TrainConfig) else MemoryConfig()
    if "auto" in (memory.recompute, memory.offload):
        raise ConfigError(
            "memory: auto chooses for one batch size, and the largest one is asked for.", "Set memory.recompute, e.g. to 1."
        )
    check_memory(memory, trial.device, "off")
    with trial.unchanged():
        limit = free_for(trial) if budget is None else int(budget * GIB)
        proved = prove if prove is not None else budget is not None or trial.device.type == "cuda"
        return largest(trial, Setting(setting.precision, memory, min(2, setting.parts)), limit, prove=proved)


def _trial(
    model: nn.Module | TrainConfig, data: Any, loss: LossConfig | None, optim: OptimConfig | None, precision: str
) -> tuple[Trial, Setting, int]:
    """A trial of a config or a copy of a module; how its step computes; the samples of a micro-step."""
    if isinstance(model, TrainConfig):
        trial, precision = trial_of(model, data)
        return trial, Setting(precision, parts=model.accumulate), max(1, model.data.batch_size // model.accumulate)
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        raise ConfigError(
            f"A {type(model).__name__} alone does not tell what it trains on.", "Give a batch, data=(x, y), or a TrainConfig."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x, y = (part.to(device) for part in data)
    objective = Objective(copy.deepcopy(model), make_loss(loss or LossConfig()))
    return Trial(objective, (x, y), optim or OptimConfig()), Setting(precision), len(x)
