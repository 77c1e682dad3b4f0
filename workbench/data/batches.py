"""Batches for a rank: which samples at which step, from device memory or through a loader.

The order of samples and every random draw follow from (seed, epoch, step) alone. So a run resumes in the middle of an epoch
exactly, and the global batch of a step is the same on any number of ranks, micro-steps or loader processes, however unequally
the ranks share it (:meth:`Batches.share_out`).
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from workbench.data.augment import Draw
from workbench.data.config import AUGMENTATIONS, DataConfig
from workbench.data.mix import cutmix, mix_targets, mixup
from workbench.data.splits import Arrays, Splits
from workbench.errors import ConfigError, DataError, WorkbenchError

Batch = tuple[Any, Tensor]
MIXES = {"mixup": mixup, "cutmix": cutmix}
_PREFETCH = 4  # micro-batches that each loader process reads ahead


@dataclass(frozen=True)
class Shard:
    """This process's share of each step: rank of ``world``, in ``micro`` micro-steps."""

    rank: int = 0
    world: int = 1
    micro: int = 1
    sizes: tuple[int, ...] = ()
    """Samples of each rank in a global batch, multiples of ``micro``; by default equal."""


@dataclass(frozen=True)
class Target:
    """Where batches go: the device, the type of floating-point images, and whether these are channels-last."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers; distinct parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Batches:
    """Training and evaluation batches of one rank.

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
        self.splits, self.config, self.shard, self.target, self.seed = splits, config, shard, target, seed
        self.samples = len(splits.train)  # type: ignore[arg-type]
        parts = shard.world * shard.micro
        if config.batch_size % parts and not shard.sizes:
            raise ConfigError(
                f"data.batch_size={config.batch_size} does not divide into {shard.world} rank(s) × accumulate={shard.micro}.",
                f"Take a multiple of {parts}, e.g. {max(1, round(config.batch_size / parts)) * parts}.",
            )
        if config.batch_size > self.samples:
            raise ConfigError(
                f"data.batch_size={config.batch_size} is larger than the {self.samples} training samples.",
                f"Take at most {self.samples}.",
            )
        self.steps_per_epoch = self.samples // config.batch_size
        names = splits.augment if config.augment is None else config.augment
        self._augmentations = [AUGMENTATIONS.factory(name) for name in names]
        self._mix = MIXES.get(config.mix)
        if self._mix is not None:
            _check_mixable(splits, config)
        self._classes = splits.num_classes
        self.waited = 0.0
        """Seconds that this process has waited for samples."""
        self._shares: list[tuple[int, tuple[int, ...]]] = []
        self._places: dict[tuple[int, ...], list[slice | Tensor]] = {}
        self.share_out(shard.sizes or (config.batch_size // shard.world,) * shard.world, 0)
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
        _end(getattr(self._loader, "_iterator", None))
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

    def order(self, epoch: int) -> Tensor:
        """int64 [N] on the CPU: the epoch's permutation of the samples."""
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(derive_seed(self.seed, epoch)))

    # -- shares -------------------------------------------------------------------------------------------------------

    def share_out(self, sizes: tuple[int, ...], step: int) -> None:
        """From optimizer step ``step`` of the run on, counted from 0, each rank takes so many samples of a global batch.

        Every rank is told the same, at least :attr:`ahead` steps before.

        Args:
            sizes: one a rank, multiples of the number of micro-steps; their sum is the global batch.
        """
        whole, grain = sum(sizes) == self.config.batch_size, all(size > 0 and size % self.shard.micro == 0 for size in sizes)
        if len(sizes) != self.shard.world or not whole or not grain:
            raise ConfigError(
                f"Shares of {sizes} samples do not make {self.shard.world} rank(s) of a batch of {self.config.batch_size}.",
                f"Give each rank a multiple of accumulate={self.shard.micro}, that many in all.",
            )
        self._shares = [(since, known) for since, known in self._shares if since < step] + [(step, sizes)]
        if sizes not in self._places:
            self._places[sizes] = [self._place(_micro_part(sizes, self.shard, micro)) for micro in range(self.shard.micro)]

    def sizes(self, step: int) -> tuple[int, ...]:
        """Samples of each rank in the global batch of optimizer step ``step`` of the run, counted from 0."""
        return next(sizes for since, sizes in reversed(self._shares) if since <= step)

    def parts(self, step: int) -> float:
        """Into how many micro-batches of this rank's size one rank's equal share of the global batch divides at ``step``.

        The number of micro-steps, where shares are equal. A micro-batch's mean loss divided by this, summed over micro-steps and
        averaged over ranks, is the mean over the global batch.
        """
        return self.config.batch_size * self.shard.micro / (self.sizes(step)[self.shard.rank] * self.shard.world)

    def part(self, step: int, micro: int) -> slice:
        """Place of this rank's micro-batch in the global batch."""
        return _micro_part(self.sizes(step), self.shard, micro)

    @property
    def ahead(self) -> int:
        """Between two steps: of how many coming ones the samples may have been chosen already."""
        return 0 if self.in_memory else math.ceil((_PREFETCH * self.config.workers + 1) / self.shard.micro)

    def _place(self, part: slice) -> slice | Tensor:
        """Positions in the global batch that a micro-step reads: its own, and then its samples' partners where these differ."""
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
            for place in self._places[self.sizes(epoch * self.steps_per_epoch + step)]:
                index = batch[place]
                yield x.index_select(0, index), y.index_select(0, index)

    def _from_loader(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._loader is None:
            workers = self.config.workers
            self._plan = _Plan(self)
            self._loader = DataLoader(
                _Seeded(self.splits.train, self.seed),
                batch_sampler=self._plan,
                num_workers=workers,
                persistent_workers=workers > 0,
                prefetch_factor=_PREFETCH if workers else None,
                pin_memory=self.target.device.type == "cuda",
                collate_fn=_collate,
                generator=torch.Generator(),  # else each pass over the loader draws from the generator that dropout draws from
            )
        self._plan.epoch, self._plan.start = epoch, start
        yield from _moved(iter(self._loader), self.target.device, self._check)

    def _finish(self, x: Any, y: Tensor, epoch: int, step: int, micro: int) -> Batch:
        images = _are_images(x)
        if not images and self._mix is None:
            return x, y
        self._generator.manual_seed(derive_seed(self.seed, epoch, step))
        at = epoch * self.steps_per_epoch + step
        if images:
            draw = Draw(self._generator, self.config.batch_size, self._places[self.sizes(at)][micro])
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
        mine = self._own(len(split))  # type: ignore[arg-type]
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
        loader = DataLoader(
            _Seeded(split, self.seed),
            batch_sampler=plan,
            num_workers=self.config.workers,
            collate_fn=_collate,
            generator=torch.Generator(),
        )
        read = iter(loader)
        try:
            for x, y in _moved(read, self.target.device, self._check):
                yield (self._normalize(x) if _are_images(x) else x), y, len(y)
        finally:
            _end(read)

    def _own(self, count: int) -> range:
        """Which of so many evaluation samples are this rank's: its share of them."""
        rank, sizes = self.shard.rank, self._shares[-1][1]
        if len(set(sizes)) == 1:
            return range(rank, count, self.shard.world)
        begin, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
        return range(count * begin // self.config.batch_size, count * end // self.config.batch_size)


def _micro_part(sizes: tuple[int, ...], shard: Shard, micro: int) -> slice:
    size = sizes[shard.rank] // shard.micro
    start = sum(sizes[: shard.rank]) + micro * size
    return slice(start, start + size)


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
            for place in batches._places[batches.sizes(epoch * batches.steps_per_epoch + step)]:
                yield [(epoch, index) for index in batch[place.cpu() if isinstance(place, Tensor) else place].tolist()]


class _Seeded(Dataset[Any]):
    """A data set whose samples draw the same random numbers whichever process reads them, and whenever."""

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed = derive_seed(self.seed, epoch, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - users' transforms draw from the global generator
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the accelerator's generator too
        if isinstance(self.source, Arrays):
            return self.source.x[index], self.source.y[index]
        return self.source[index]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        # Without worker processes the global generators are the trainer's own: give them back as they were.
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        samples: list[Any] = []
        try:
            for key in keys:
                try:
                    samples.append(self[key])
                except WorkbenchError as error:
                    samples = [error]
                    break
                except Exception as error:
                    samples = [
                        DataError(f"Sample {key[1]} cannot be read: {type(error).__name__}: {error}.", "Mend or remove it.")
                    ]
                    break
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
            torch.set_rng_state(kept[2])
        return samples


def _collate(samples: list[Any]) -> Any:
    """A batch, or the error that a loader process met, which travels to the trainer as it is."""
    if isinstance(samples[0], WorkbenchError):
        return samples[0]
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        return DataError(f"Samples do not stack into a batch: {error}.", "Give every sample the same shape and type.")


def _moved(loader: Iterator[Any], device: torch.device, check: Callable[[Tensor], None]) -> Iterator[Batch]:
    """Batches on the device; on an accelerator the next one is copied while the present one is used."""
    if device.type != "cuda":
        for batch in loader:
            yield _checked(batch, check)
        return
    stream = torch.cuda.Stream(device)
    ahead: Any = None
    for batch in loader:
        _checked(batch, check)
        with torch.cuda.stream(stream):
            copied = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
        if ahead is not None:
            yield _handed_over(ahead, stream)
        ahead = copied
    if ahead is not None:
        yield _handed_over(ahead, stream)


def _end(iterator: Any) -> None:
    """End a loader's processes, if it has any."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _handed_over(batch: Any, stream: torch.cuda.Stream) -> Batch:
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    torch.utils._pytree.tree_map_only(Tensor, lambda t: t.record_stream(current), batch)
    return batch


def _checked(batch: Any, check: Callable[[Tensor], None]) -> Batch:
    if isinstance(batch, WorkbenchError):
        raise batch
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise DataError(f"A sample is a {type(batch).__name__}, not a pair (x, y).", "Return (input, target) from the data set.")
    if isinstance(batch[1], Tensor):
        check(batch[1])
    return batch  # type: ignore[return-value]
