"""Batches for a rank: which samples at which step, from device memory or through a loader.

The order of samples and every random draw follow from (seed, epoch, step) alone. So a run resumes in the middle of an epoch
exactly, and the global batch of a step is the same on any number of ranks, micro-steps or loader processes, however unequally
the ranks share it (:mod:`~workbench.data.order`). What doesn't lie in memory is read by :mod:`~workbench.data.workers`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from workbench.data.augment import Draw
from workbench.data.config import AUGMENTATIONS, DataConfig
from workbench.data.mix import cutmix, mix_targets, mixup
from workbench.data.order import Shard, SharedOrder, derive_seed
from workbench.data.splits import Arrays, Splits
from workbench.data.workers import PREFETCH, end, make_loader, moved
from workbench.errors import ConfigError

Batch = tuple[Any, Tensor]
MIXES = {"mixup": mixup, "cutmix": cutmix}


@dataclass(frozen=True)
class Target:
    """Where batches go: the device, the type of floating-point images, and whether these are channels-last."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


class Batches(SharedOrder):
    """Training and evaluation batches of one rank: an order, and the samples.

    Args:
        splits: the data.
        config: batch size and augmentation.
        shard: this rank's share.
        target: where the batches go.
        seed: of order and augmentation.

    Raises:
        ConfigError: the batch does not divide into ranks and micro-steps, or is larger than the data set; or samples of this
            kind cannot be mixed.
    """

    def __init__(self, splits: Splits, config: DataConfig, shard: Shard, target: Target, seed: int) -> None:
        super().__init__(len(splits.train), config.batch_size, shard, seed)  # type: ignore[arg-type]
        self.splits, self.config, self.target = splits, config, target
        names = splits.augment if config.augment is None else config.augment
        self._augmentations = [AUGMENTATIONS.factory(name) for name in names]
        self._mix = MIXES.get(config.mix)
        if self._mix is not None:
            _check_mixable(splits, config)
        self._classes = splits.num_classes
        self.waited = 0.0
        """Seconds that this process has waited for samples."""
        self._known_places: dict[tuple[int, ...], list[slice | Tensor]] = {}
        self._generator = torch.Generator(device=target.device)
        self._scale, self._bias = _affine(splits, target)
        self._source: tuple[Tensor, Tensor] | None = None
        self._held_out: tuple[Tensor, Tensor] | None = None
        self._loader: DataLoader[Any] | None = None
        self._check: Callable[[Tensor], None] = lambda target: None

    @property
    def in_memory(self) -> bool:
        """Whether samples are held as tensors (on the device) rather than read by loader processes."""
        return isinstance(self.splits.train, Arrays) and self.config.placement != "loader"

    @property
    def waiting(self) -> list[Tensor]:
        """Samples that wait on the device, training and held-out ones."""
        return [part for split in (self._source, self._held_out) if split is not None for part in split]

    def close(self) -> None:
        """End the loader's processes now, not when the last reference goes (an error's traceback may hold one for long)."""
        end(getattr(self._loader, "_iterator", None))
        self._loader = None

    def watch(self, check: Callable[[Tensor], None], classes: int) -> None:
        """Have ``check`` look at all targets before an accelerator gets them: now if they are in memory, else as they come.

        Args:
            classes: of the model's output, which mixed targets are then probabilities of.
        """
        self._classes = classes
        for split in (self.splits.train, self.splits.eval):
            if isinstance(split, Arrays):
                check(split.y)
        self._check = check

    @property
    def ahead(self) -> int:
        """Between two steps: of how many coming ones the samples may have been chosen already."""
        return 0 if self.in_memory else math.ceil((PREFETCH * self.config.workers + 1) / self.shard.micro)

    def _places(self, step: int) -> list[slice | Tensor]:
        """Positions in the global batch that each micro-step of optimizer step ``step`` of the run reads."""
        sizes = self.sizes(step)
        if sizes not in self._known_places:
            self._known_places[sizes] = [self._place(self.part(step, micro)) for micro in range(self.shard.micro)]
        return self._known_places[sizes]

    def _place(self, part: slice) -> slice | Tensor:
        """A micro-step's own samples, and then their partners where these differ."""
        if self._mix is None or part.stop - part.start == self.config.batch_size:
            return part
        own = torch.arange(part.start, part.stop)
        return torch.cat([own, self.config.batch_size - 1 - own]).to(self.target.device)

    # -- training -----------------------------------------------------------------------------------------------------

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Iterable[Batch]]:
        """The epoch's steps from ``start``; each is this rank's micro-batches, on the device.

        Raises:
            DataError: a sample cannot be read.
        """
        read = self._from_memory(epoch, start) if self.in_memory else self._from_loader(epoch, start)
        for step in range(start, self.steps_per_epoch):
            yield self._micro_batches(read, epoch, step)

    def _micro_batches(self, read: Iterator[Batch], epoch: int, step: int) -> Iterator[Batch]:
        for micro in range(self.shard.micro):
            began = time.perf_counter()
            x, y = next(read)
            self.waited += time.perf_counter() - began
            yield self._finish(x, y, epoch, step, micro)

    def _from_memory(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._source is None:
            assert isinstance(self.splits.train, Arrays)
            self._source = self.splits.train.x.to(self.target.device), self.splits.train.y.to(self.target.device)
        x, y = self._source
        order = self.order(epoch)
        if self.target.device.type == "cuda":  # pinned, so that the copy does not wait for the steps still queued
            order = order.pin_memory().to(self.target.device, non_blocking=True)
        for step in range(start, self.steps_per_epoch):
            batch = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            for place in self._places(epoch * self.steps_per_epoch + step):
                index = batch[place]
                yield x.index_select(0, index), y.index_select(0, index)

    def _from_loader(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._loader is None:
            workers = self.config.workers
            self._plan = _Plan(self)
            self._loader = make_loader(
                self.splits.train, self.seed, self._plan, workers, lasting=True, pinned=self.target.device.type == "cuda"
            )
        self._plan.epoch, self._plan.start = epoch, start
        yield from moved(iter(self._loader), self.target.device, self._check)

    def _finish(self, x: Any, y: Tensor, epoch: int, step: int, micro: int) -> Batch:
        images = _are_images(x)
        if not images and self._mix is None:
            return x, y
        self._generator.manual_seed(derive_seed(self.seed, epoch, step))
        at = epoch * self.steps_per_epoch + step
        if images:
            draw = Draw(self._generator, self.config.batch_size, self._places(at)[micro])
            for augmentation in self._augmentations:
                x = augmentation(x, draw)
            x = self._normalize(x)
        if self._mix is None:
            return x, y
        part = self.part(at, micro)
        size = part.stop - part.start
        other, other_y = (whole.flip(0) if len(whole) == size else whole[size:] for whole in (x, y))
        draw = Draw(self._generator, self.config.batch_size, part)
        mixed, share = self._mix(x[:size], other, draw, self.config.mix_alpha)
        return mixed, mix_targets(y[:size], other_y, share, self._classes)

    def _normalize(self, x: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> floating point, mean 0 and standard deviation 1 by channel."""
        layout = torch.channels_last if self.target.channels_last else torch.contiguous_format
        return torch.addcmul(self._bias, x, self._scale).to(self.target.dtype, memory_format=layout)

    def evaluation(self) -> Iterator[tuple[Any, Tensor, int]]:
        """This rank's share of the evaluation samples: (x, y, count), of which the first ``count`` rows are to be counted.

        Batches held in memory have one fixed shape: the last is filled up, so that compiled models see no other.
        """
        size, split = self.config.eval_batch_size, self.splits.eval
        mine = self.share_of(len(split))  # type: ignore[arg-type]
        if isinstance(split, Arrays):
            size = min(size, len(mine)) or 1
            if self._held_out is None:
                self._held_out = (split.x.to(self.target.device), split.y.to(self.target.device))
            for start in range(0, len(mine), size):
                rows = list(mine[start : start + size])
                index = torch.tensor(rows + rows[:1] * (size - len(rows)), device=self.target.device)
                x, y = (part.index_select(0, index) for part in self._held_out)
                yield (self._normalize(x) if _are_images(x) else x), y, len(rows)
            return
        plan = [[(0, row) for row in mine[start : start + size]] for start in range(0, len(mine), size)]
        loader = make_loader(split, self.seed, plan, self.config.workers)
        read = iter(loader)
        try:
            for x, y in moved(read, self.target.device, self._check):
                yield (self._normalize(x) if _are_images(x) else x), y, len(y)
        finally:
            end(read)


def _are_images(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 4


def _check_mixable(splits: Splits, config: DataConfig) -> None:
    """Blends need numbers, boxes need images."""
    x = splits.first_input
    if not isinstance(x, Tensor) or not (x.is_floating_point() or (x.dtype == torch.uint8 and x.ndim == 3)):
        kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"data.mix={config.mix!r} cannot mix samples of {kind}.", "It takes images or floating-point features.")
    if config.mix == "cutmix" and x.ndim != 3:
        raise ConfigError(f"data.mix='cutmix' pastes images; samples here are {list(x.shape)}.", "Take data.mix=mixup.")


def _affine(splits: Splits, target: Target) -> tuple[Tensor, Tensor]:
    """Scale and bias [1, C, 1, 1] that take pixels 0…255 to mean 0 and standard deviation 1."""
    mean = torch.tensor(splits.mean or (0.0,), dtype=torch.float64).view(1, -1, 1, 1)
    std = torch.tensor(splits.std or (1.0,), dtype=torch.float64).view(1, -1, 1, 1)
    scale, bias = 1 / (255 * std), -mean / std
    return scale.to(target.device, torch.float32), bias.to(target.device, torch.float32)


class _Plan:
    """Batch sampler of a rank's micro-batches: (epoch, index) pairs, from a given step of a given epoch."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.epoch, self.start = batches, 0, 0

    def __len__(self) -> int:
        return (self.batches.steps_per_epoch - self.start) * self.batches.shard.micro

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches, epoch, size = self.batches, self.epoch, self.batches.config.batch_size
        order = batches.order(epoch)
        for step in range(self.start, batches.steps_per_epoch):
            batch = order[step * size : (step + 1) * size]
            for place in batches._places(epoch * batches.steps_per_epoch + step):
                yield [(epoch, index) for index in batch[place.cpu() if isinstance(place, Tensor) else place].tolist()]
