"""Which elements of a tensor make its sample: all units at positions spread over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SHAPES = 256
"""Shapes, or sets of shapes, whose layouts are kept: batches of many lengths would else fill the memory with them."""


@dataclass(frozen=True)
class Layout:
    """Which elements of a tensor, in memory order, make its sample: all units at ``rows`` of its positions.

    A unit is a channel or feature. Position ``p`` of unit ``c`` lies at ``(p // inner) * units * inner + c * inner + p % inner``;
    row ``r`` of the sample is position ``r * step % positions``, with ``step`` near the golden section of all positions and
    without a common factor, so that any number of rows spreads over them evenly.
    """

    count: int
    units: int
    inner: int
    positions: int
    rows: int
    step: int

    def places(self, device: torch.device) -> Tensor:
        """int64 [rows × units]: where the sample's elements lie."""
        return _places(self).to(device)


@lru_cache(maxsize=SHAPES)
def _places(layout: Layout) -> Tensor:
    position = torch.arange(layout.rows) * layout.step % layout.positions
    start = position // layout.inner * (layout.units * layout.inner) + position % layout.inner
    return (start[:, None] + torch.arange(layout.units) * layout.inner).reshape(-1)


def in_memory_order(value: Tensor) -> Tensor:
    """The elements with the innermost dimension last, without a copy for contiguous and channels-last tensors."""
    if value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        return value.permute(0, 2, 3, 1)
    return value.contiguous()


def layout_of(value: Tensor, dim: int, sample: int) -> Layout:
    """The layout of ``value`` for a sample of at most ``sample`` elements.

    Args:
        dim: that its units lie along: 1 for channels of images, -1 for features; 0 for a tensor without units.
    """
    shape, axis = tuple(in_memory_order(value).shape), dim % max(1, value.ndim)
    if not value.is_contiguous() and value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
        axis = (0, 3, 1, 2)[axis]
    return _layout(shape, axis if dim else 0, sample)


@lru_cache(maxsize=8 * SHAPES)
def _layout(shape: tuple[int, ...], axis: int, sample: int) -> Layout:
    count = math.prod(shape)
    units = inner = 1
    if axis and shape[axis] <= sample:
        units, inner = shape[axis], math.prod(shape[axis + 1 :])
    positions = count // units
    step = max(1, round(positions * 0.6180339887498949))
    while math.gcd(step, positions) != 1:
        step += 1
    return Layout(count, units, inner, positions, min(positions, max(1, sample // units)), step)
