"""What occlusion takes away at a time: patches of an image, sliding windows, spans of a text, groups of a table's columns."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attribution.calls import is_ids
from workbench.attribution_config import AttributionConfig
from workbench.errors import ConfigError


def patches_of(x: Tensor, count: int) -> Tensor | None:
    """Numbers of the parts that occlusion takes away, in a shape that broadcasts to ``x``; None: every value is one.

    Of images (N, C, H, W), at most ``count`` × ``count`` patches through all channels; of sequences (N, L, F), the steps.
    """
    if x.dim() == 3:
        return torch.arange(x.shape[1], device=x.device).reshape(1, -1, 1)
    if x.dim() < 4:
        return None
    rows, columns = (torch.arange(size, device=x.device) * min(count, size) // size for size in x.shape[-2:])
    grid = rows[:, None] * min(count, x.shape[-1]) + columns
    return grid.reshape(*[1] * (x.dim() - 2), *grid.shape)


def columns_of(x: Tensor, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Numbers of a table's columns (1, F), those of a group sharing one.

    Raises:
        ConfigError: the input is no table (N, F) of numbers, or has no such column.
    """
    if x.dim() != 2 or is_ids(x):
        raise ConfigError(f"groups={groups} are columns of a table (N, F), and this input is {list(x.shape)}.", "Leave them out.")
    if max(map(max, groups)) >= x.shape[1]:
        raise ConfigError(f"groups={groups} name columns beyond the {x.shape[1]} there are.", f"Take 0 … {x.shape[1] - 1}.")
    found = torch.arange(x.shape[1], device=x.device)
    for group in groups:
        found[list(group)] = min(group)
    return found.unique(return_inverse=True)[1][None]


def window_of(x: Tensor, config: AttributionConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the window that slides over one sample.

    Of images (C, H, W) it takes all channels, of sequences (L, F) all features.

    Raises:
        ConfigError: the input is a table, or smaller than the window.
    """
    size, stride = config.window, config.stride or config.window
    if x.dim() == 2 and not is_ids(x):
        raise ConfigError(f"window={size} has no order of columns to slide along in {list(x.shape)}.", "Name groups of columns.")
    sides = x.shape[-2:] if x.dim() >= 4 else x.shape[1:2]
    if size > min(sides):
        raise ConfigError(f"window={size} is larger than the input, {list(x.shape[1:])}.", f"Take at most {min(sides)}.")
    if x.dim() >= 4:
        before = tuple(x.shape[1:-2])
        return (*before, size, size), (*before, stride, stride)
    after = tuple(x.shape[2:])
    return (size, *after), (stride, *after)
