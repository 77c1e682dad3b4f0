"""Which samples a step takes, and whose they are: the order of an epoch, shared out to ranks and micro-steps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """This process's share of each step: rank of ``world``, in ``micro`` micro-steps."""

    rank: int = 0
    world: int = 1
    micro: int = 1
    sizes: tuple[int, ...] = ()
    """Samples of each rank in a global batch, multiples of ``micro``; by default equal."""


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers; distinct parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class SharedOrder:
    """The order of samples, and each rank's part of it.

    Args:
        samples: to train on.
        batch_size: of a step, all ranks.
        shard: this rank's share.
        seed: of the order.

    Raises:
        ConfigError: the batch does not divide into ranks and micro-steps, or is larger than the data set.
    """

    def __init__(self, samples: int, batch_size: int, shard: Shard, seed: int) -> None:
        self.samples, self.batch_size, self.shard, self.seed = samples, batch_size, shard, seed
        parts = shard.world * shard.micro
        if batch_size % parts and not shard.sizes:
            raise ConfigError(
                f"data.batch_size={batch_size} does not divide into {shard.world} rank(s) × accumulate={shard.micro}.",
                f"Take a multiple of {parts}, e.g. {max(1, round(batch_size / parts)) * parts}.",
            )
        if batch_size > self.samples:
            raise ConfigError(
                f"data.batch_size={batch_size} is larger than the {self.samples} training samples.",
                f"Take at most {self.samples}.",
            )
        self.steps_per_epoch = self.samples // batch_size
        self._shares: list[tuple[int, tuple[int, ...]]] = []
        self.share_out(shard.sizes or (batch_size // shard.world,) * shard.world, 0)

    def order(self, epoch: int) -> Tensor:
        """int64 [N] on the CPU: the epoch's permutation of the samples."""
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(derive_seed(self.seed, epoch)))

    def share_out(self, sizes: tuple[int, ...], step: int) -> None:
        """From optimizer step ``step`` of the run on, counted from 0, each rank takes so many samples of a global batch.

        Every rank is told the same, before the samples of that step are chosen (:attr:`~workbench.data.batches.Batches.ahead`).

        Args:
            sizes: one a rank, multiples of the number of micro-steps; their sum is the global batch.
        """
        whole, grain = sum(sizes) == self.batch_size, all(size > 0 and size % self.shard.micro == 0 for size in sizes)
        if len(sizes) != self.shard.world or not whole or not grain:
            raise ConfigError(
                f"Shares of {sizes} samples do not make {self.shard.world} rank(s) of a batch of {self.batch_size}.",
                f"Give each rank a multiple of accumulate={self.shard.micro}, that many in all.",
            )
        self._shares = [(since, known) for since, known in self._shares if since < step] + [(step, sizes)]

    def sizes(self, step: int) -> tuple[int, ...]:
        """Samples of each rank in the global batch of optimizer step ``step`` of the run, counted from 0."""
        return next(sizes for since, sizes in reversed(self._shares) if since <= step)

    def parts(self, step: int) -> float:
        """Into how many micro-batches of this rank's size one rank's equal share of the global batch divides at ``step``.

        The number of micro-steps, where shares are equal. A micro-batch's mean loss divided by this, summed over micro-steps and
        averaged over ranks, is the mean over the global batch.
        """
        return self.batch_size * self.shard.micro / (self.sizes(step)[self.shard.rank] * self.shard.world)

    def part(self, step: int, micro: int) -> slice:
        """Place of this rank's micro-batch in the global batch."""
        sizes, rank = self.sizes(step), self.shard.rank
        size = sizes[rank] // self.shard.micro
        start = sum(sizes[:rank]) + micro * size
        return slice(start, start + size)

    def share_of(self, count: int) -> range:
        """Which of so many evaluation samples are this rank's: its share of them."""
        rank, sizes = self.shard.rank, self._shares[-1][1]
        if len(set(sizes)) == 1:
            return range(rank, count, self.shard.world)
        begin, end = sum(sizes[:rank]), sum(sizes[: rank + 1])
        return range(count * begin // self.batch_size, count * end // self.batch_size)
