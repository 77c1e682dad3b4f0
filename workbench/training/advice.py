"""What to do after running out of memory: settings that are predicted to fit, and proved to by a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from workbench.allocator import forget
from workbench.training.blocks import blocks_of
from workbench.training.fitting import GIB, free_for, sample_batch, travelling
from workbench.training.trial import Line, Setting, Trial

if TYPE_CHECKING:
    from workbench.training.trainer import Trainer

PATIENCE = 20.0
"""Seconds after which no further setting is tried, once there is one that fits; without, three times as many."""

ENOUGH = 3
"""Proved settings that are given."""


@dataclass(frozen=True)
class Remedy:
    """Settings with which a step fits: bytes at its peak, predicted from smaller steps and measured in one of that size."""

    overrides: dict[str, Any]
    predicted: int
    measured: int
    normalized: int | None = None
    """Samples that batch statistics would then be of, where that changes."""

    def __str__(self) -> str:
        settings = " with ".join(f"{name}={value}" for name, value in self.overrides.items())
        note = f"; batch statistics are then of {self.normalized} samples" if self.normalized else ""
        return f"{settings} ({self.predicted / GIB:.3g} GiB predicted, {self.measured / GIB:.3g} measured{note})"


@dataclass(frozen=True)
class Advice:
    """What the step that ran out would have taken, what there is, in bytes, and what fits."""

    needed: int
    available: int
    remedies: list[Remedy]


def advise(trainer: Trainer, error: BaseException) -> Advice | None:
    """Settings that fit where ``trainer`` ran out in a step; it cannot be used afterwards. None where nothing could be tried."""
    arranged = trainer.config.mesh.arranged(trainer.world.size)
    if arranged["replicate"] < trainer.world.size or trainer.world.others or not trainer.model.training:
        return None
    try:
        return _Search(trainer, error).advice()
    except Exception:  # past helping: the first error is the one to tell
        return None


class _Search:
    """Steps of a failed trainer's objective on this rank, once all else that a step leaves behind is gone."""

    def __init__(self, trainer: Trainer, error: BaseException) -> None:
        self.started = time.monotonic()
        config = trainer.config
        trainer.optimizer.state.clear()
        trainer.economy.undo(state=False)
        trainer.objective.zero_grad(set_to_none=True)
        if isinstance(trainer.parallel.forward, DistributedDataParallel):
            trainer.parallel.forward._remove_autograd_hooks()  # its peers don't take part
        if config.compile != "off":
            torch.compiler.reset()  # what captured graphs hold
        forget(error)
        held = travelling(trainer.objective) if trainer.world.size > 1 else 0
        self.trial = Trial(trainer.objective, sample_batch(trainer.batches), config.optim, held=held)
        self.base = Setting(trainer.precision.name, config.memory, config.accumulate)
        self.samples, self.parts = len(self.trial.batch[0]), config.accumulate
        self.whole = config.data.batch_size
        self.blocks = len(blocks_of(trainer.model))
        self.limit = free_for(self.trial) + held
        self.lines: dict[Setting, Line] = {}

    def advice(self) -> Advice:
        remedies: list[Remedy] = []
        for overrides, setting, samples in self.candidates():
            spent = time.monotonic() - self.started
            if len(remedies) == ENOUGH or spent > (PATIENCE if remedies else 3 * PATIENCE):
                break
            predicted = self.line(setting).at(samples)
            cost = self.trial.measure(samples, setting) if predicted <= self.limit else None
            if cost is not None and cost.peak <= self.limit:
                shown = samples if samples < self.samples and self.trial.normalized else None
                remedies.append(Remedy(overrides, predicted, cost.peak, shown))
        return Advice(self.line(self.base).at(self.samples), self.limit, remedies)

    def candidates(self) -> Iterator[tuple[dict[str, Any], Setting, int]]:
        """(overrides, how a step then computes, samples of its micro-steps): those that cost least time come first."""
        base, precisions = self.base, [self.base.precision]
        if base.precision in ("fp32", "tf32") and (self.trial.device.type == "cpu" or torch.cuda.is_bf16_supported()):
            precisions.append("bf16")
        yield from self.divided(base, {})
        for precision in precisions[1:]:
            yield {"precision": precision}, replace(base, precision=precision), self.samples
        if self.blocks and not base.memory.recompute:
            for precision in precisions:
                setting = self.recomputed(replace(base, precision=precision))
                change: dict[str, Any] = {} if precision == base.precision else {"precision": precision}
                yield change | {"memory.recompute": setting.memory.recompute}, setting, self.samples
        if self.trial.device.type == "cuda" and base.memory.offload == "none":
            for offload in ("optimizer", "activations"):
                yield {"memory.offload": offload}, _saving(base, offload=offload), self.samples
        if self.blocks and not base.memory.recompute:
            yield from self.divided(_saving(base, recompute=1.0), {"memory.recompute": 1.0})
        if most := min(self.samples - 1, self.line(base).largest(self.limit)):
            yield {"data.batch_size": self.whole * most // self.samples}, base, most

    def line(self, setting: Setting) -> Line:
        setting = replace(setting, parts=min(2, setting.parts))  # the second finds gradients there, later ones nothing new
        if setting not in self.lines:
            self.lines[setting] = self.trial.line(setting, self.samples)
        return self.lines[setting]

    def divided(self, setting: Setting, change: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Setting, int]]:
        """The same in more micro-steps, as few as fit."""
        most = self.line(replace(setting, parts=2)).largest(self.limit)
        for factor in range(2, self.samples + 1):
            if self.samples % factor == 0 and self.trial.least <= self.samples // factor <= most:
                parts = self.parts * factor
                yield change | {"accumulate": parts}, replace(setting, parts=parts), self.samples // factor
                return

    def recomputed(self, setting: Setting) -> Setting:
        """The same with the fewest blocks recomputed under which it is predicted to fit; with all, where it never is."""
        low, high = 0, self.blocks
        while high - low > 1:
            middle = (low + high) // 2
            predicted = self.line(_saving(setting, recompute=middle / self.blocks)).at(self.samples)
            low, high = (low, middle) if predicted <= self.limit else (middle, high)
        return _saving(setting, recompute=high / self.blocks)


def _saving(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, memory=setting.memory.override(changes))
