"""The CUDA kernels of the probes by Triton's interpreter against the CPU's own way; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from workbench.probes import triton_kernels
from workbench.probes.base import ACTIVATIONS, GRADIENTS
from workbench.probes.bins import Bins
from workbench.probes.kernels import FIELDS, Plan, Tally
from workbench.probes.sampling import in_memory_order, layout_of

SAMPLE = 1024
FREE = (0.0, -math.inf, math.inf)


def values() -> list[tuple[Tensor, int]]:
    """Tensors with the dimension of their units."""
    torch.manual_seed(0)
    strange = torch.randn(40, 33)
    strange[0, 0], strange[1, 1], strange[2, 2], strange[3, 3] = math.nan, math.inf, -math.inf, 1e-42
    strange[:, 5] = 0
    images = torch.randn(8, 24, 7, 5)
    return [
        (images * 3, 1),
        (images.to(memory_format=torch.channels_last).relu(), 1),
        (torch.randn(5, 11, 96), -1),
        (torch.randn(5000) * 1e-6, 0),
        (torch.randn(3, 4096), -1),
        (torch.tanh(torch.randn(80, 6) * 30), -1),
        (strange, -1),
    ]


def narrow() -> list[tuple[Tensor, int]]:
    """Tensors of 16 bits: such as squares can be trusted of, and such as they can't."""
    torch.manual_seed(1)
    plain = torch.randn(7, 9000)
    spoiled = plain.clone()
    spoiled[3, 77], spoiled[5, 8000] = math.nan, math.inf
    tensors = [plain, spoiled, plain * 1e-25, plain * 3e18, plain.relu(), torch.zeros(1, 9000), plain[:, :100] * 1e-30]
    return [(tensor.bfloat16(), -1) for tensor in tensors]


def moments_of_16_bits() -> None:
    """Against float64, by one launch each and by one of all; of the sample alone, those of the sample."""
    tensors, dims = zip(*narrow(), strict=True)
    limits = [FREE] * len(dims)
    layouts = [layout_of(value, dim, SAMPLE) for value, dim in zip(tensors, dims, strict=True)]
    for exact in (True, False):
        one, many = (launched(list(dims), programs, ACTIVATIONS, limits) for programs in (2, 512))
        plan = Plan(range(len(dims)), layouts, torch.bfloat16, torch.device("cpu"), exact)
        for row, value in enumerate(tensors):
            flat = in_memory_order(value).reshape(-1)
            triton_kernels.record(flat, layouts[row], one.partials[row], one.samples[row], exact=exact)
        triton_kernels.record_all(plan, tensors, many.partials, many.samples, exact=exact)
        for tally in (one, many):
            got = triton_kernels.finish(tally.partials, tally.samples, ACTIVATIONS, tally.limits, tally.runs)
            for row, value in enumerate(tensors):
                wide = value.double().flatten()
                wide = wide if exact else wide[layouts[row].places(wide.device)]
                assert got[row, 0] == len(wide) and got[row, 3] == (wide == 0).sum()
                assert got[row, 4] == len(wide) - torch.isfinite(wide).sum()
                expected = torch.stack([wide.sum(), wide.square().sum(), wide.min(), wide.max()])
                scale = torch.stack([wide.abs().sum(), wide.square().sum(), *[wide.abs().max()] * 2])
                apart = (got[row, [1, 2, 5, 6]] - expected).abs()
                assert (
                    (apart <= 2e-7 * scale) | (expected.isnan() & got[row, [1, 2, 5, 6]].isnan())
                ).all() or not scale.isfinite().all()
                np.testing.assert_array_equal(got[row, [5, 6]], expected[2:])


def launched(dims: list[int], programs: int, bins: Bins, limits: list[tuple[float, float, float]]) -> Tally:
    """A tally with the partial results of so many programs."""
    tally = Tally(dims, SAMPLE, bins, torch.device("cpu"), limits)
    tally.partials = torch.zeros(len(dims), programs, FIELDS, dtype=torch.float64)
    tally._reset()
    return tally


def main() -> None:
    tensors, dims = zip(*values(), strict=True)
    limits = [FREE] * len(dims)
    limits[0], limits[5] = (0.5, -0.1, 0.1), (0.0, -0.99, 0.99)
    for bins in (ACTIVATIONS, GRADIENTS):
        reference = Tally(dims, SAMPLE, bins, torch.device("cpu"), limits)
        one, many = (launched(list(dims), programs, bins, limits) for programs in (8, 512))
        layouts = [layout_of(value, dim, SAMPLE) for value, dim in zip(tensors, dims, strict=True)]
        plan = Plan(range(len(dims)), layouts, torch.float32, torch.device("cpu"))
        for _ in range(2):
            for row, value in enumerate(tensors):
                reference.record(row, value)
                flat = in_memory_order(value).reshape(-1)
                triton_kernels.record(flat, layouts[row], one.partials[row], one.samples[row])
            triton_kernels.record_all(plan, tensors, many.partials, many.samples)
            expected = reference.finish().numpy()
            for found in (one, many):
                assert torch.equal(found.samples.nan_to_num(7.0), reference.samples.nan_to_num(7.0))
                got = triton_kernels.finish(found.partials, found.samples, bins, found.limits, found.runs).numpy()
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
            assert not many.partials[..., :5].any() and torch.isinf(many.partials[..., 5:7]).all()
    plain = [row for row, dim in enumerate(dims) if dim == 0]
    changed = [tensors[row] * 1.5 for row in plain]
    plan = Plan(plain, [layouts[row] for row in plain], torch.float32, torch.device("cpu"))
    found_change = triton_kernels.change(plan, changed, reference.samples)
    np.testing.assert_allclose(found_change, reference.change(plain, changed), rtol=1e-12)


if __name__ == "__main__":
    main()
    moments_of_16_bits()
