"""One pass over a tensor for all its moments: a Triton kernel on CUDA, torch's reductions elsewhere, the same numbers.

:func:`record` is one opaque operator: ``torch.compile`` neither breaks its graph there nor tries to fuse reductions over every
layer of a model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 512
"""Parallel partial results that the CUDA kernel keeps by row, merged when they are read."""

MOMENTS = 7
"""Columns: count, sum, sum of squares, zeros, non-finite elements, smallest, largest."""


def new_partials(rows: int, device: torch.device) -> Tensor:
    """Empty partial results, float64 [rows, programs, MOMENTS]."""
    partials = torch.empty(rows, PROGRAMS if device.type == "cuda" else 1, MOMENTS, dtype=torch.float64, device=device)
    reset(partials)
    return partials


def reset(partials: Tensor) -> None:
    """Forget what was recorded."""
    partials.zero_()
    partials[..., 5] = float("inf")
    partials[..., 6] = -float("inf")


def merged(partials: Tensor) -> Tensor:
    """[rows, parts, MOMENTS] -> [rows, MOMENTS], float64."""
    return torch.cat([partials[..., :5].sum(1), partials[..., 5:6].amin(1), partials[..., 6:7].amax(1)], dim=1)


@torch.library.custom_op("workbench::record", mutates_args=("partials", "samples"))
def record(value: Tensor, partials: Tensor, samples: Tensor, row: int, stride: int) -> None:
    """Add the elements of ``value`` to the row ``row``: moments of all of them, and every ``stride``-th into the sample.

    Args:
        value: floating point, of any shape, at least one element.
        partials: of :func:`new_partials`.
        samples: float32 [rows, sample].
    """
    flat = in_memory_order(value)
    sample = flat[::stride][: samples.shape[1]]
    samples[row, : sample.numel()].copy_(sample)
    if value.is_cuda:
        launch, block = _kernel()
        with torch.cuda.device_of(flat):  # Triton takes the present device, whatever the tensors are on
            launch(flat, partials[row], flat.numel(), block)
        return
    count, total = flat.numel(), flat.sum(dtype=torch.float64)
    norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
    zeros = count - torch.count_nonzero(flat)
    low, high = torch.aminmax(flat)
    found = torch.stack([torch.full_like(total, count), total, norm * norm, zeros.double(), count_nonfinite(flat).double()])
    partials[row, 0, :5] += found
    partials[row, 0, 5] = torch.minimum(partials[row, 0, 5], low.double())
    partials[row, 0, 6] = torch.maximum(partials[row, 0, 6], high.double())


def count_nonfinite(value: Tensor) -> Tensor:
    """Number of NaN and infinite elements, a scalar int64 tensor."""
    return torch.count_nonzero(value - value)  # a finite number less itself is zero; NaN and infinities give NaN


def in_memory_order(value: Tensor) -> Tensor:
    """The elements as [N], without a copy for contiguous and channels-last tensors."""
    if value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        value = value.permute(0, 2, 3, 1)
    return value.reshape(-1)


@cache
def _kernel() -> tuple[Any, int]:
    """The compiled kernel's launcher and its block. Triton is imported on first use: it comes with CUDA builds only."""
    from workbench.probes import triton_moments

    return triton_moments.launch, triton_moments.BLOCK
