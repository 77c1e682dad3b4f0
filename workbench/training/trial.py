"""Real training steps at any batch size, measured and undone.

A :class:`Trial` answers what a step would take: :meth:`Trial.measure` runs some, :class:`Line` predicts from small ones.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.allocator import forget, held_by, ran_out, room, tensor_bytes, trim
from workbench.data.batches import Batches, Target
from workbench.data.order import Shard
from workbench.data.splits import load_splits
from workbench.distributed import pick_device
from workbench.errors import ConfigError, MemoryExhausted
from workbench.losses import make_loss
from workbench.models import build_model
from workbench.models.structure import lay_out
from workbench.optim import make_optimizer
from workbench.optim_config import OptimConfig
from workbench.training import decisions, fp8
from workbench.training.checkpoint import random_state, set_random_state
from workbench.training.config import TrainConfig
from workbench.training.economy import Economy
from workbench.training.memory_config import MemoryConfig
from workbench.training.objective import Objective
from workbench.training.precision import Precision
from workbench.training.subject import fit_to_data

AGREEMENT = 0.02
"""Share by which the memory of one more sample may differ between two pairs of batch sizes that lie on one line."""


@dataclass(frozen=True)
class Setting:
    """How a trial's step computes: in ``parts`` micro-steps, in a precision, with a memory config in which nothing is auto.

    ``compiled``: by the objective's compiled call, if it has one.
    """

    precision: str = "fp32"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parts: int = 1
    compiled: bool = False


@dataclass(frozen=True)
class Cost:
    """What a step takes: bytes at its peak (weights, gradients, optimizer state, activations), and seconds."""

    peak: int
    seconds: float = math.nan


class Trial:
    """Steps of an objective on this device, alone; between them, weights and random states stay as they are.

    Args:
        objective: on its device.
        batch: x and y [N, ...], there too; repeated or cut to the sizes asked for.
        optim: the optimizer.
        held: bytes that a rank keeps besides, such as what gradients travel in.
        choice: the layers that multiply in FP8 in that precision; None where they already do.

    Raises:
        ConfigError: batches of several tensors, whose size is unknown.
    """

    def __init__(
        self,
        objective: Objective,
        batch: tuple[Any, Tensor],
        optim: OptimConfig,
        *,
        held: int = 0,
        choice: fp8.Choice | None = None,
    ) -> None:
        if not isinstance(batch[0], Tensor):
            raise ConfigError(
                f"Memory is measured on batches of one tensor; this one's input is a {type(batch[0]).__name__}.",
                "Set memory.recompute and memory.offload to what you want.",
            )
        self.objective, self.batch, self.optim, self.held = objective, batch, optim, held
        self.choice = choice
        self.device = batch[0].device
        self.normalized = any(isinstance(module, _BatchNorm) for module in objective.modules())
        self.least = 2 if self.normalized else 1
        """Fewest samples of a micro-step: batch normalization in training takes two."""

    def measure(self, samples: int, setting: Setting, *, timed: bool = False) -> Cost | None:
        """The cost of a step whose micro-steps have ``samples`` each, or None when it doesn't fit.

        The first of two steps makes the optimizer's state; then, if ``timed``, the faster of two more gives the time.
        """
        rows = torch.arange(samples, device=self.device) % len(self.batch[0])
        seconds: list[float] = []
        try:
            x, y = (part.index_select(0, rows) for part in self.batch)
            with self._steps(x, y, setting) as step:
                parts = min(2, setting.parts)
                _, most = held_by(lambda: (step(parts), step(parts)), self.device, clean=False)
                for _ in range(2 if timed else 0):
                    start = time.perf_counter()
                    step(setting.parts)
                    self._wait()
                    seconds.append(time.perf_counter() - start)
        except Exception as error:
            if not ran_out(error) and "could not create a" not in str(error):  # what oneDNN says when it gets no memory
                raise
            forget(error)
            return None
        finally:
            self.objective.zero_grad(set_to_none=True)
            if self.device.type == "cpu":
                trim()
        return Cost(tensor_bytes(self.objective) + self.held + most, min(seconds, default=math.nan))

    @contextmanager
    def _steps(self, x: Any, y: Tensor, setting: Setting) -> Iterator[Callable[[int], None]]:
        trained = self.objective.trained
        optimizer = make_optimizer(trained, self.optim)
        precision = Precision(setting.precision, self.device)
        if self.choice is not None:
            precision.convert(self.choice)
        economy = Economy(setting.memory, self.objective.model, optimizer)

        call = self.objective if setting.compiled else self.objective.forward

        def step(parts: int) -> None:
            if setting.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            for _ in range(parts):
                with economy.forward(), precision.autocast():
                    loss = call(x, y) / parts
                precision.backward(loss)
            precision.step(optimizer)
            optimizer.zero_grad(set_to_none=True)

        try:
            yield step
        finally:
            economy.undo(state=False)
            precision.release()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Weights, buffers, random states and switches are afterwards what they were."""
        states = random_state(self.device)
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        mode = self.objective.training
        kept = {name: value.detach().to("cpu", copy=True) for name, value in self.objective.state_dict().items()}
        try:
            self.objective.train()
            yield
        finally:
            self.objective.train(mode)
            with torch.no_grad():
                for name, value in self.objective.state_dict().items():
                    value.copy_(kept[name])
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
            set_random_state(states, self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def line(self, setting: Setting, near: int | None = None) -> Line:
        """Peak memory by samples of a micro-step, from steps of two or more small sizes.

        Sizes double until two pairs of them agree on what one more sample takes: in smaller steps another moment, such as the
        update, may hold the most.

        Args:
            near: size that will be asked for; sizes measured stay at or under half of it, where these are enough.

        Raises:
            MemoryExhausted: not even the smallest step fits.
        """
        size = 2 if near is None else max(2, near // 16)
        sizes: list[int] = []
        peaks: list[int] = []
        while (cost := self.measure(size, setting)) is not None or (not peaks and size > self.least):
            if cost is None:
                size = max(self.least, size // 2)
                continue
            sizes.append(size)
            peaks.append(cost.peak)
            each = [(b - a) / (m - n) for a, b, n, m in zip(peaks, peaks[1:], sizes, sizes[1:], strict=False)]
            if len(each) > 1 and each[-1] > 0 and abs(each[-1] - each[-2]) <= AGREEMENT * each[-1]:
                break
            size *= 2
            if near is not None and each and size > near // 2:
                soon = peaks[-1] + each[-1] * (size - sizes[-1])
                if len(each) > 1 or size > near or soon > room(self.device) / 2:
                    break
        if not peaks:
            raise MemoryExhausted(f"A step of {size} samples does not fit.", "Take a smaller model, or spread it: mesh.shard.")
        if len(peaks) == 1:
            return Line(0.0, peaks[0] / sizes[0])
        return Line(peaks[-1] - each[-1] * sizes[-1], each[-1])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Line:
    """Peak memory as ``base`` + ``each`` × samples, in bytes."""

    base: float
    each: float

    def at(self, samples: int) -> int:
        return round(self.base + self.each * samples)

    def largest(self, limit: float) -> int:
        """Most samples that stay within ``limit`` bytes; 0 for none."""
        return max(0, math.floor((limit - self.base) / self.each)) if self.each > 0 else 2**20


def trial_of(config: TrainConfig, data: Any = None, root: str | os.PathLike[str] | None = None) -> tuple[Trial, str]:
    """A trial of a config's model, loss, optimizer and data on this device, and the precision that it would train in.

    Args:
        data: as in :func:`workbench.train`.
        root: folder that relative names of the config are looked up in.
    """
    device = pick_device(config.device)
    splits = load_splits(config.data, data, root=Path(root) if root is not None else None)
    precision = Precision(decisions.decide_precision(config, device, decisions.Decisions()), device)
    torch.manual_seed(config.seed)
    model = build_model(fit_to_data(config, splits), root=Path(root) if root is not None else None).to(device)
    channels_last = config.channels_last and len(splits.sample_shape) == 3 and lay_out(model, device)
    target = Target(device, precision.dtype, channels_last)
    size = min(config.data.batch_size, len(splits.train))  # type: ignore[arg-type]
    batches = Batches(splits, config.data.override({"batch_size": size}), Shard(), target, config.seed)
    try:
        (batch,) = next(iter(batches.epoch(0)))
    finally:
        batches.close()
    choice = None
    if precision.name == "fp8":
        samples = max(1, size // config.accumulate)
        choice = fp8.choose(model, batch[0][:2], len(batch[0][:2]), samples, precision.autocast).check(model)
    objective = Objective(model, make_loss(config.loss), config.penalties)
    return Trial(objective, batch, config.optim, choice=choice), precision.name
