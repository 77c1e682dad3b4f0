"""Augmentations of image batches, drawn per sample, computed on the device.

Each takes uint8 or floating-point images [B, C, H, W] of values 0…255 and a :class:`Draw`, and returns images of the same
shape and type. A draw gives the same numbers for a sample however the global batch is split over ranks and micro-steps.
TrivialAugment's many operations have a module of their own, :mod:`workbench.data.trivial`; what mixes samples and their
targets is in :mod:`workbench.data.mix`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


class Draw:
    """Random numbers for one optimizer step: drawn for the whole global batch, sliced to this part of it.

    Args:
        generator: seeded for the step, on the device that computes.
        total: samples in the global batch.
        part: this part's place in the global batch: a slice, or positions on the generator's device.
    """

    def __init__(self, generator: torch.Generator, total: int, part: slice | Tensor) -> None:
        self.generator, self.total, self.part = generator, total, part

    def integers(self, low: int, high: int) -> Tensor:
        """int64 [B], uniform in low … high (both included)."""
        drawn = torch.randint(low, high + 1, (self.total,), generator=self.generator, device=self.generator.device)
        return drawn[self.part]

    def uniform(self) -> Tensor:
        """float32 [B], uniform in [0, 1)."""
        return torch.rand(self.total, generator=self.generator, device=self.generator.device)[self.part]

    def beta(self, alpha: float) -> Tensor:
        """float32 [B], of the distribution Beta(alpha, alpha)."""
        shape = torch.full((2, self.total), alpha, device=self.generator.device, dtype=torch.float64)
        one, other = torch._standard_gamma(shape, self.generator).clamp(min=torch.finfo(torch.float64).tiny)
        return (one / (one + other)).float()[self.part]


def crop(x: Tensor, draw: Draw, padding: int | None = None) -> Tensor:
    """Pad by zeros (an eighth of the side unless told) and cut out at a random place (Krizhevsky 2009; He et al. 2016)."""
    _, _, height, width = x.shape
    pad = max(1, height // 8) if padding is None else padding
    top, left = draw.integers(0, 2 * pad), draw.integers(0, 2 * pad)
    rows = top[:, None] + torch.arange(height, device=x.device)  # [B, H]
    columns = left[:, None] + torch.arange(width, device=x.device)  # [B, W]
    return _pick(F.pad(x, (pad, pad, pad, pad)), rows, columns)


def reflect_crop(x: Tensor, draw: Draw) -> Tensor:
    """Like :func:`crop`, but the border is filled with the image's own mirror image instead of zeros."""
    _, _, height, width = x.shape
    pad = max(1, height // 8)
    top, left = draw.integers(-pad, pad), draw.integers(-pad, pad)
    rows = _mirrored(top[:, None] + torch.arange(height, device=x.device), height)
    columns = _mirrored(left[:, None] + torch.arange(width, device=x.device), width)
    return _pick(x, rows, columns)


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices outside 0 … size - 1 reflected at the first and last."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows [B, H] and columns [B, W] of the images, by sample."""
    sample = torch.arange(len(x), device=x.device)
    picked = x.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return picked.permute(0, 3, 1, 2)


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


def random_erasing(x: Tensor, draw: Draw) -> Tensor:
    """Blank a random rectangle by the image's mean colour, half of the samples (Zhong et al. 2017, arXiv:1708.04896).

    As in the paper, the rectangle has 2 to 40 % of the image's area and an aspect ratio of 0.3 to 1/0.3; it lies within the
    image, so that one too long for it is cut to its side.
    """
    _, _, height, width = x.shape
    chosen = draw.uniform() < 0.5
    area = (0.02 + 0.38 * draw.uniform()) * (height * width)
    ratio = torch.exp((2 * draw.uniform() - 1) * math.log(1 / 0.3))
    tall = (area * ratio).sqrt().round().clamp(1, height)  # [B]
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top = (draw.uniform() * (height - tall + 1)).floor()
    left = (draw.uniform() * (width - wide + 1)).floor()
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (row >= top[:, None]) & (row < (top + tall)[:, None])  # [B, H]
    columns = (column >= left[:, None]) & (column < (left + wide)[:, None])  # [B, W]
    erased = rows[:, None, :, None] & columns[:, None, None, :] & chosen[:, None, None, None]
    return torch.where(erased, x.float().mean((2, 3), keepdim=True).to(x.dtype), x)


def color_jitter(x: Tensor, draw: Draw, strength: float = 0.4) -> Tensor:
    """Brightness, then contrast, each by a factor from 1 - strength to 1 + strength (Krizhevsky et al. 2012; torchvision)."""
    brightness, contrast = (1 + strength * (2 * draw.uniform() - 1) for _ in range(2))
    brightened = (x.float() * brightness[:, None, None, None]).clamp(0, 255)
    mean = brightened.mean((1, 2, 3), keepdim=True)
    return (mean + (brightened - mean) * contrast[:, None, None, None]).clamp(0, 255).to(x.dtype)
