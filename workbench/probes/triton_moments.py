"""The CUDA kernel behind :func:`workbench.probes.kernels.record`. Imported only where there is a CUDA device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _moments(x, out, count, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, count, programs * BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        wide = value.to(tl.float64)
        total += wide
        square += wide * wide
        zeros += ((value == 0.0) & inside).to(tl.int32)
        bad += ((value - value) != 0.0).to(tl.int32)
        low = tl.minimum(low, tl.where(inside, value, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.where(inside, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    row = out + program * COLUMNS
    # A comparison with NaN is false, so the extremes are NaN exactly where a NaN was among the bad ones.
    nan = tl.sum((low != low).to(tl.int32), 0) > 0
    smallest = tl.where(nan, float("nan"), tl.min(tl.where(low != low, float("inf"), low), 0))
    largest = tl.where(nan, float("nan"), tl.max(tl.where(high != high, float("-inf"), high), 0))
    before_low = tl.load(row + 5)
    before_high = tl.load(row + 6)
    tl.store(row + 1, tl.load(row + 1) + tl.sum(total, 0))
    tl.store(row + 2, tl.load(row + 2) + tl.sum(square, 0))
    tl.store(row + 3, tl.load(row + 3) + tl.sum(zeros, 0).to(tl.float64))
    tl.store(row + 4, tl.load(row + 4) + tl.sum(bad, 0).to(tl.float64))
    tl.store(row + 5, tl.minimum(before_low, smallest.to(tl.float64), propagate_nan=tl.PropagateNan.ALL))
    tl.store(row + 6, tl.maximum(before_high, largest.to(tl.float64), propagate_nan=tl.PropagateNan.ALL))
    if program == 0:
        tl.store(row, tl.load(row) + count.to(tl.float64))


def launch(flat: Tensor, partials: Tensor, count: int, block: int) -> None:
    """Add the moments of ``flat`` [count] to ``partials`` [programs, columns], a program's share to its row."""
    programs, columns = partials.shape
    grid = (min(programs, triton.cdiv(count, block)),)
    _moments[grid](flat, partials, count, BLOCK=block, COLUMNS=columns, num_warps=8)
