"""Bins of histograms by the exponent bits of what is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bins:
    """How sampled magnitudes are counted: by exponent bits, ``per_octave`` 1 or 2, from 2^low to 2^high.

    ``signed``: the bins of negative numbers mirror those of positive ones, with one about zero between; else bin 0 holds what
    is below 2^low, zero included. The outermost hold everything beyond. NaN is counted nowhere.
    """

    low: int
    high: int
    per_octave: int = 1
    signed: bool = False

    @property
    def steps(self) -> int:
        """Bins on one side of zero, that up to infinity included."""
        return (self.high - self.low) * self.per_octave + 1

    @property
    def count(self) -> int:
        return (2 if self.signed else 1) * self.steps + 1

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges of the bins, one more than bins, infinities included; bins are closed below."""
        magnitudes = tuple(2.0 ** (self.low + k / self.per_octave) for k in range(self.steps))
        below = (-math.inf, *(-m for m in reversed(magnitudes))) if self.signed else (0.0,)
        return (*below, *magnitudes, math.inf)

    def place(self, values: Tensor) -> Tensor:
        """The bin of each of ``values`` (float32, any shape), int64; :attr:`count` for NaN."""
        bits = values.contiguous().view(torch.int32)
        magnitude = (bits & 0x7FFFFFFF).long()
        negative = (bits < 0) & (magnitude > 0)
        inner = magnitude - negative.long() * self.signed  # bins of negative numbers are closed on their outer side
        step = (inner >> 23) - 127 - self.low
        if self.per_octave == 2:
            step = 2 * step + ((inner & 0x7FFFFF) >= SQRT2)
        step = (step + 1).clamp(0, self.steps)
        if self.signed:
            step = self.steps + torch.where(negative, -step, step)
        return torch.where(magnitude > 0x7F800000, self.count, step)


SQRT2 = 0x3504F3
"""Mantissa bits of the square root of two."""
