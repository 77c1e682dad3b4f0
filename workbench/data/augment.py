"""Augmentations of image batches, drawn per sample, computed on the device.

Each takes uint8 or floating-point images [B, C, H, W] and a :class:`Draw`, and returns images of the same shape and type.
A draw gives the same numbers for a sample however the global batch is split over ranks and micro-steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Draw:
    """Random numbers for one optimizer step: drawn for the whole global batch, sliced to this part of it.

    Args:
        generator: seeded for the step, on the device that computes.
        total: samples in the global batch.
        part: this part's place in the global batch.
    """

    def __init__(self, generator: torch.Generator, total: int, part: slice) -> None:
        self.generator, self.total, self.part = generator, total, part

    def integers(self, low: int, high: int) -> Tensor:
        """int64 [B], uniform in low … high (both included)."""
        drawn = torch.randint(low, high + 1, (self.total,), generator=self.generator, device=self.generator.device)
        return drawn[self.part]

    def uniform(self) -> Tensor:
        """float32 [B], uniform in [0, 1)."""
        return torch.rand(self.total, generator=self.generator, device=self.generator.device)[self.part]


def crop(x: Tensor, draw: Draw, padding: int | None = None) -> Tensor:
    """Pad by zeros (an eighth of the side unless told) and cut out at a random place (Krizhevsky 2009; He et al. 2016)."""
    batch, _, height, width = x.shape
    pad = max(1, height // 8) if padding is None else padding
    top, left = draw.integers(0, 2 * pad), draw.integers(0, 2 * pad)
    padded = F.pad(x, (pad, pad, pad, pad))
    rows = top[:, None] + torch.arange(height, device=x.device)  # [B, H]
    columns = left[:, None] + torch.arange(width, device=x.device)  # [B, W]
    sample = torch.arange(batch, device=x.device)
    cut = padded.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return cut.permute(0, 3, 1, 2)


def shift(x: Tensor, draw: Draw) -> Tensor:
    """Move by up to one pixel in each direction: for small images such as 8×8 digits."""
    return crop(x, draw, padding=1)


def flip(x: Tensor, draw: Draw) -> Tensor:
    """Mirror left to right, half of the samples."""
    return torch.where((draw.uniform() < 0.5)[:, None, None, None], x.flip(3), x)


def cutout(x: Tensor, draw: Draw) -> Tensor:
    """Blank a random square of half the side (DeVries & Taylor 2017, arXiv:1708.04552)."""
    _, _, height, width = x.shape
    half = max(1, height // 4)
    row, column = draw.integers(0, height - 1), draw.integers(0, width - 1)
    far_row = (torch.arange(height, device=x.device)[None, :] - row[:, None]).abs() >= half  # [B, H]
    far_column = (torch.arange(width, device=x.device)[None, :] - column[:, None]).abs() >= half  # [B, W]
    return x * (far_row[:, None, :, None] | far_column[:, None, None, :])
