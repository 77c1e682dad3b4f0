"""What makes a step fit: the fastest way of saving memory under a budget, the largest batch, advice after running out.

Each is predicted from small steps, then proved by a real one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.allocator import room, tensor_bytes
from workbench.data.batches import Batches
from workbench.distributed import World
from workbench.errors import MemoryExhausted, WorkbenchError
from workbench.training.blocks import blocks_of
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions
from workbench.training.memory_config import MemoryConfig
from workbench.training.objective import Objective
from workbench.training.trial import Cost, Line, Setting, Trial

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
SHARE = 0.9
"""Of what a device has free, that a step may take: allocators keep memory in pieces."""


@dataclass(frozen=True)
class Tried:
    """One way of saving memory: its peak, predicted from small steps and measured in real ones, in bytes; seconds a step."""

    memory: MemoryConfig
    predicted: int
    measured: Cost | None = None

    def fits(self, budget: int) -> bool:
        return self.measured is not None and self.measured.peak <= budget


@dataclass(frozen=True)
class Choice:
    """The fastest way found to keep a step under a budget.

    Attributes:
        memory: what to train with.
        reason: why.
        tried: everything that was predicted or measured, the largest first.
        budget: bytes.
    """

    memory: MemoryConfig
    reason: str
    tried: list[Tried]
    budget: int

    @property
    def overrides(self) -> dict[str, Any]:
        """For ``TrainConfig.override``."""
        return {"memory.recompute": self.memory.recompute, "memory.offload": self.memory.offload}

    @property
    def table(self) -> pd.DataFrame:
        """By what was tried: recompute, offload, predicted_gib, peak_gib, seconds a step, fits, chosen."""
        import pandas as pd

        return pd.DataFrame(
            {
                "recompute": tried.memory.recompute,
                "offload": tried.memory.offload,
                "predicted_gib": tried.predicted / GIB,
                "peak_gib": tried.measured.peak / GIB if tried.measured else math.nan,
                "seconds": tried.measured.seconds if tried.measured else math.nan,
                "fits": tried.fits(self.budget),
                "chosen": tried.memory == self.memory,
            }
            for tried in self.tried
        )


@dataclass(frozen=True)
class LargestBatch:
    """The most samples of a step that fit a budget.

    Attributes:
        samples: of one micro-step on one rank.
        predicted: bytes at its peak, from smaller steps.
        measured: bytes of a real step of that size, or None where none was run.
        budget: bytes.
    """

    samples: int
    predicted: int
    measured: int | None
    budget: int

    @property
    def error(self) -> float:
        """Predicted over measured peak, less one; NaN where nothing was measured."""
        return self.predicted / self.measured - 1 if self.measured else math.nan


def free_for(trial: Trial) -> int:
    """Bytes that a trial's steps may take, its model included, on what the device has free."""
    return int(SHARE * room(trial.device)) + tensor_bytes(trial.objective)


def choose(trial: Trial, memory: MemoryConfig, samples: int, setting: Setting, budget: int, *, captured: bool = False) -> Choice:
    """Of what ``memory`` leaves to auto, the fastest that keeps a step under ``budget``.

    For each kind of offload, the fewest recomputed blocks whose predicted peak fits are found by bisection; steps of those that
    fit are then run and timed.

    Args:
        samples: of a micro-step.
        setting: precision and micro-steps.
        budget: bytes.
        captured: the run's graphs will be, so that activations stay where they are.

    Raises:
        MemoryExhausted: nothing fits.
    """
    blocks = len(blocks_of(trial.objective.model))
    lines: dict[MemoryConfig, Line] = {}
    tried: dict[MemoryConfig, Tried] = {}

    def predicted(plan: MemoryConfig) -> int:
        if plan not in lines:
            lines[plan] = trial.line(replace(setting, memory=plan), samples)
        return lines[plan].at(samples)

    def fewest(offload: str) -> Iterator[MemoryConfig]:
        """Plans from the least work that is predicted to fit; the first one that proves to is wanted."""
        if memory.recompute != "auto":
            yield MemoryConfig(recompute=memory.recompute, offload=offload)
            return
        plans = [MemoryConfig(recompute=count / max(1, blocks), offload=offload) for count in range(blocks + 1)]
        low, high = -1, len(plans) - 1  # the last is tried whatever is predicted
        while high - low > 1:
            middle = 0 if low < 0 else (low + high) // 2
            low, high = (low, middle) if predicted(plans[middle]) <= budget else (middle, high)
        yield from plans[high:]

    offloads = [memory.offload] if memory.offload != "auto" else ["none"]
    if memory.offload == "auto" and trial.device.type == "cuda":
        offloads += ["optimizer"] if captured else ["optimizer", "activations", "both"]
    for offload in offloads:
        for plan in fewest(offload):
            found = Tried(plan, predicted(plan))
            if found.predicted <= 1.05 * budget:  # beyond the error of predictions, nothing is risked
                found = replace(found, measured=trial.measure(samples, replace(setting, memory=plan), timed=True))
            tried[plan] = found
            if found.fits(budget):
                break
        if found.fits(budget) and plan == MemoryConfig():
            return Choice(plan, f"{_told(found, budget)}, and nothing is faster", [found], budget)
    for plan, line in lines.items():
        tried.setdefault(plan, Tried(plan, line.at(samples)))
    fitting = [entry for entry in tried.values() if entry.fits(budget)]
    if not fitting:
        least = min(tried.values(), key=lambda entry: entry.predicted)
        raise MemoryExhausted(
            f"Nothing brings a step of {samples} samples under {budget / GIB:.3g} GiB: the least, {_named(least.memory)}, takes "
            f"{least.predicted / GIB:.3g}.",
            "Set accumulate higher, data.batch_size lower, or memory.budget to that.",
        )
    best = min(fitting, key=lambda entry: entry.measured.seconds if entry.measured else math.inf)
    reason = _told(best, budget) + (f", the fastest of {len(fitting)} that fit" if len(fitting) > 1 else "")
    if (plain := tried.get(MemoryConfig())) is not None:
        reason += f"; keeping everything would take {plain.predicted / GIB:.3g} GiB"
    order = sorted(tried.values(), key=lambda entry: -entry.predicted)
    return Choice(best.memory, reason, order, budget)


def largest(trial: Trial, setting: Setting, budget: int, *, prove: bool = True) -> LargestBatch:
    """The largest micro-step under ``budget`` bytes: from a line through small ones, and where ``prove``, by a real step.

    From 16 on, a multiple of 8, as tensor cores like it.

    Raises:
        MemoryExhausted: no batch fits.
    """
    line, measured = trial.line(setting), None
    for _ in range(4):
        samples = line.largest(budget)
        samples -= samples % 8 if samples >= 16 else 0
        if samples < trial.least:
            break
        predicted = line.at(samples)
        if not prove:
            return LargestBatch(samples, predicted, None, budget)
        measured = trial.measure(samples, setting)
        if measured is not None and measured.peak <= budget:
            return LargestBatch(samples, predicted, measured.peak, budget)
        # What was measured corrects the slope; a step that ran out took more than there is.
        peak = measured.peak if measured is not None else 1.1 * max(budget, predicted)
        line = Line(line.base, (peak - line.base) / samples)
    raise MemoryExhausted(
        f"No batch fits {budget / GIB:.3g} GiB: one sample takes about {line.at(1) / GIB:.3g}.",
        "Take a smaller model, or memory.recompute=1.",
    )


def settle_memory(
    config: TrainConfig,
    objective: Objective,
    batches: Batches,
    precision: str,
    compile_mode: str,
    world: World,
    decided: Decisions,
) -> MemoryConfig:
    """A run's memory config with nothing left to auto: as decided before, else as rank 0 finds by :func:`choose`.

    Raises:
        MemoryExhausted: nothing fits.
    """
    memory = config.memory
    wanted = [name for name in ("recompute", "offload") if getattr(memory, name) == "auto"]
    if any(f"memory.{name}" not in decided.made for name in wanted):
        box: list[Any] = [None]
        if world.main:
            trial = Trial(objective, sample_batch(batches), config.optim, held=travelling(objective) if world.size > 1 else 0)
            captured = compile_mode in ("reduce-overhead", "max-autotune")
            budget = free_for(trial) if memory.budget is None else int(memory.budget * GIB)
            try:
                with trial.unchanged():
                    setting = Setting(precision, parts=config.accumulate)
                    box = [choose(trial, memory, len(trial.batch[0]), setting, budget, captured=captured)]
            except WorkbenchError as error:
                box = [error]
        if world.size > 1:
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], WorkbenchError):
            raise box[0]
        for name in wanted:
            reason = box[0].reason + ("" if compile_mode == "off" else " (measured before compiling)")
            decided.decide(f"memory.{name}", getattr(box[0].memory, name), reason)
    return memory.override({name: decided.made[f"memory.{name}"]["value"] for name in wanted})


def sample_batch(batches: Batches) -> tuple[Any, Tensor]:
    """A micro-batch of this rank. Training samples are on the device afterwards, if that is where they wait."""
    if batches.in_memory:
        return next(iter(next(iter(batches.epoch(0)))))
    size = batches.config.batch_size // (batches.shard.world * batches.shard.micro)
    x, y, _ = next(batches.evaluation())
    rows = torch.arange(size, device=y.device) % len(y)
    return (x[rows] if isinstance(x, Tensor) else x), y[rows]


def travelling(objective: Objective) -> int:
    """Bytes that copies on several ranks keep for gradients on their way."""
    return sum(p.numel() * p.element_size() for p in objective.trained.parameters() if p.requires_grad)


def _told(tried: Tried, budget: int) -> str:
    assert tried.measured is not None
    cost = f"{tried.measured.peak / GIB:.3g} of {budget / GIB:.3g} GiB and {tried.measured.seconds * 1e3:.3g} ms a step"
    return f"{_named(tried.memory)} takes {cost}"


def _named(plan: MemoryConfig) -> str:
    parts = [f"recomputing {plan.recompute:.0%} of the blocks"] if plan.recompute else []
    if plan.offload != "none":
        parts.append("offloading " + ("activations and optimizer" if plan.offload == "both" else plan.offload))
    return " and ".join(parts) or "keeping everything"
