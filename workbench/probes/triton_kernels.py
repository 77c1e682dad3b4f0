"""The CUDA kernels behind :mod:`workbench.probes.kernels`. Imported only where there is a CUDA device.

Sums are of float64; loads are 16 bytes wide and unmasked but for a tensor's last block. What is rare, NaN, infinities and numbers
whose squares vanish, is found out afterwards, and read once more with care.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.probes.bins import Bins
    from workbench.probes.kernels import Plan
    from workbench.probes.sampling import Layout

BLOCK = 2048
DEEP = 4
"""Blocks that are added up without a look back: they are under way at once."""
SOME = 256
UNITS = 256
FIELDS = tl.constexpr(9)
MOMENTS = tl.constexpr(7)
HEAD = tl.constexpr(10)
ENOUGH = tl.constexpr(64)
SQRT2 = tl.constexpr(0x3504F3)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


# Jit functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def _add(value, inside, total, square, seen, low, high):
    """A block's values to the running sums of each lane; zeros and non-finite elements are counted in one word."""
    wide = value.to(tl.float64)
    total += wide
    square += wide * wide
    seen += ((value == 0.0) & inside).to(tl.int32) + ((value - value) != 0.0).to(tl.int32) * 65536
    low = tl.minimum(low, tl.where(inside, value, float("inf")), propagate_nan=_ALL)
    high = tl.maximum(high, tl.where(inside, value, float("-inf")), propagate_nan=_ALL)
    return total, square, seen, low, high


@triton.jit
def _reduced(total, square, seen, low, high):
    """Of all lanes: sum, sum of squares, zeros, non-finite elements, smallest and largest, NaN where there is one."""
    # A comparison with NaN is false, so the extremes are NaN exactly where a NaN was among the bad ones.
    nan = tl.sum((low != low).to(tl.int32), 0) > 0
    smallest = tl.where(nan, float("nan"), tl.min(tl.where(low != low, float("inf"), low), 0))
    largest = tl.where(nan, float("nan"), tl.max(tl.where(high != high, float("-inf"), high), 0))
    return tl.sum(total, 0), tl.sum(square, 0), tl.sum(seen & 65535, 0), tl.sum(seen >> 16, 0), smallest, largest


@triton.jit
def _carefully(x, count, program, programs, BLOCK: tl.constexpr):
    """A program's share of all elements, whatever they are."""
    lanes = tl.arange(0, BLOCK)
    everywhere = lanes >= 0
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    seen = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    whole = count // BLOCK
    for block in range(program, whole, programs):
        value = tl.load(x + (block * BLOCK + lanes)).to(tl.float32)
        total, square, seen, low, high = _add(value, everywhere, total, square, seen, low, high)
    if whole % programs == program:
        place = whole * BLOCK + lanes
        inside = place < count
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        total, square, seen, low, high = _add(value, inside, total, square, seen, low, high)
    return _reduced(total, square, seen, low, high)


@triton.jit
def _quickly(x, count, program, programs, BLOCK: tl.constexpr, DEEP: tl.constexpr):
    """The same with half the instructions, and whether it holds: not where there are NaN or infinities.

    Numbers of 16 bits are added up in float32, DEEP at a time, then in float64: their squares are exact but for those too small
    or too large, and of these, too, it says so.
    """
    lanes = tl.arange(0, BLOCK)
    narrow: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    whole = count // BLOCK
    blocks = tl.maximum(whole - program + programs - 1, 0) // programs
    deep = blocks // DEEP
    for group in range(deep):
        some = tl.zeros([BLOCK], tl.float32)
        squared = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(DEEP):
            value = tl.load(x + (((group * DEEP + k) * programs + program) * BLOCK + lanes)).to(tl.float32)
            if narrow:
                some += value
                squared += value * value
            else:
                wide = value.to(tl.float64)
                total += wide
                square += wide * wide
            zeros += (value == 0.0).to(tl.int32)
            low = tl.minimum(low, value)
            high = tl.maximum(high, value)
        if narrow:
            total += some.to(tl.float64)
            square += squared.to(tl.float64)
    for number in range(deep * DEEP, blocks):
        value = tl.load(x + ((number * programs + program) * BLOCK + lanes)).to(tl.float32)
        wide = value.to(tl.float64)
        total += wide
        square += wide * wide
        zeros += (value == 0.0).to(tl.int32)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
    seen = blocks * BLOCK
    if whole % programs == program:
        place = whole * BLOCK + lanes
        inside = place < count
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        wide = value.to(tl.float64)
        total += wide
        square += wide * wide
        zeros += ((value == 0.0) & inside).to(tl.int32)
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        seen += count - whole * BLOCK
    none = tl.sum(zeros, 0)
    squares = tl.sum(square, 0)
    holds = squares < float("inf")
    if narrow:
        # A square below float32's smallest normal number, 2^-126, is off by 2^-150 at most.
        holds = holds & ((squares >= seen.to(tl.float64) * 2.0**-125) | (none == seen))
    return tl.sum(total, 0), squares, none, tl.min(low, 0), tl.max(high, 0), holds


@triton.jit
def _record(
    x, out, into, count, units, inner, positions, rows, step, program, programs,
    EXACT: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A program's share of a tensor: moments of all elements, or of the sample; the sample."""
    taken = rows * units
    if EXACT:
        total, square, zeros, smallest, largest, holds = _quickly(x, count, program, programs, BLOCK, DEEP)
        broken = zeros * 0
        if not holds:
            total, square, zeros, broken, smallest, largest = _carefully(x, count, program, programs, BLOCK)
    lanes = tl.arange(0, SOME)
    sums = tl.zeros([SOME], tl.float64)
    squares = tl.zeros([SOME], tl.float64)
    seen = tl.zeros([SOME], tl.int32)
    low = tl.full([SOME], float("inf"), tl.float32)
    high = tl.full([SOME], float("-inf"), tl.float32)
    for start in range(program * SOME, taken, programs * SOME):
        element = start + lanes
        inside = element < taken
        position = (element // units) * step % positions
        place = position // inner * (units * inner) + element % units * inner + position % inner
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(into + element, value, mask=inside)
        if not EXACT:
            sums, squares, seen, low, high = _add(value, inside, sums, squares, seen, low, high)
    if not EXACT:
        total, square, zeros, broken, smallest, largest = _reduced(sums, squares, seen, low, high)
    tl.store(out + 1, tl.load(out + 1) + total)
    tl.store(out + 2, tl.load(out + 2) + square)
    tl.store(out + 3, tl.load(out + 3) + zeros.to(tl.float64))
    tl.store(out + 4, tl.load(out + 4) + broken.to(tl.float64))
    tl.store(out + 5, tl.minimum(tl.load(out + 5), smallest.to(tl.float64), propagate_nan=_ALL))
    tl.store(out + 6, tl.maximum(tl.load(out + 6), largest.to(tl.float64), propagate_nan=_ALL))
    if program == 0:
        added = count
        if not EXACT:
            added = taken
        tl.store(out, tl.load(out) + added.to(tl.float64))
        tl.store(out + 7, units.to(tl.float64))
        tl.store(out + 8, rows.to(tl.float64))


@triton.jit
def _one(
    x, out, into, count, units, inner, positions, rows, step,
    EXACT: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    wide = tl.zeros([], tl.int64)
    _record(
        x, out + program * FIELDS, into, count + wide, units + wide, inner + wide, positions + wide, rows + wide, step + wide,
        program, programs, EXACT, BLOCK, DEEP, SOME,
    )  # fmt: skip


@triton.jit
def _many(
    base, offsets, layouts, work, partials, samples, PROGRAMS, SAMPLE,
    EXACT: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(work + 2 * tl.program_id(0)).to(tl.int64)
    program = tl.load(work + 2 * tl.program_id(0) + 1).to(tl.int64)
    layout = layouts + tensor * 8
    row = tl.load(layout)
    x = base + tl.multiple_of(tl.load(offsets + tensor), 8)
    _record(
        x, partials + (row * PROGRAMS + program) * FIELDS, samples + row * SAMPLE, tl.load(layout + 2), tl.load(layout + 3),
        tl.load(layout + 4), tl.load(layout + 5), tl.load(layout + 6), tl.load(layout + 7), program, tl.load(layout + 1),
        EXACT, BLOCK, DEEP, SOME,
    )  # fmt: skip


def record(flat: Tensor, layout: Layout, partials: Tensor, samples: Tensor, *, exact: bool = True) -> None:
    """Add ``flat`` [count] to the partial results [programs, FIELDS] of its row, and put its sample in ``samples``.

    Args:
        exact: moments are of all elements; else of the sample, which alone is read then.
    """
    work = triton.cdiv(layout.count, BLOCK) if exact else triton.cdiv(layout.rows * layout.units, SOME)
    with torch.cuda.device_of(flat):  # Triton takes the present device, whatever the tensors are on
        _one[(min(partials.shape[0], work),)](
            flat, partials, samples, layout.count, layout.units, layout.inner, layout.positions, layout.rows, layout.step,
            EXACT=exact, BLOCK=BLOCK, DEEP=DEEP, SOME=SOME, num_warps=8 if exact else 4,
        )  # fmt: skip


def record_all(plan: Plan, values: Sequence[Tensor], partials: Tensor, samples: Tensor, *, exact: bool = True) -> None:
    """The same for several tensors of one type; ``exact`` as the plan is."""
    with torch.cuda.device_of(partials):
        _many[(plan.work.shape[0],)](
            plan.base, plan.offsets(values), plan.layouts, plan.work, partials, samples, partials.shape[1], samples.shape[1],
            EXACT=exact, BLOCK=BLOCK, DEEP=DEEP, SOME=SOME, num_warps=8,
        )  # fmt: skip


# -- what was found -------------------------------------------------------------------------------------------------------


@triton.jit
def _bin(value, LOW: tl.constexpr, STEPS: tl.constexpr, HALVES: tl.constexpr, SIGNED: tl.constexpr):
    """See :meth:`workbench.probes.kernels.Bins.place`."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    negative = (bits < 0) & (magnitude > 0)
    inner = magnitude
    if SIGNED:
        inner = magnitude - negative.to(tl.int32)
    step = (inner >> 23) - 127 - LOW
    if HALVES:
        step = 2 * step + ((inner & 0x7FFFFF) >= SQRT2).to(tl.int32)
    step = tl.minimum(tl.maximum(step + 1, 0), STEPS)
    if SIGNED:
        step = STEPS + tl.where(negative, -step, step)
    return step, magnitude <= 0x7F800000


@triton.jit
def _finish(
    partials, samples, limits, runs, out, SAMPLE, COUNT: tl.constexpr, LOW: tl.constexpr, STEPS: tl.constexpr,
    HALVES: tl.constexpr, SIGNED: tl.constexpr, WATCH: tl.constexpr, PROGRAMS: tl.constexpr, SPACE: tl.constexpr,
    CHUNK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mine = partials + (row * PROGRAMS + tl.arange(0, PROGRAMS)) * FIELDS
    out += row * (HEAD + COUNT)
    for field in tl.static_range(5):
        tl.store(out + field, tl.sum(tl.load(mine + field), 0))
        tl.store(mine + field, tl.zeros([PROGRAMS], tl.float64))
    low = tl.load(mine + 5)
    high = tl.load(mine + 6)
    nan = tl.sum((low != low).to(tl.int32), 0) > 0
    tl.store(out + 5, tl.where(nan, float("nan"), tl.min(tl.where(low != low, float("inf"), low), 0)))
    tl.store(out + 6, tl.where(nan, float("nan"), tl.max(tl.where(high != high, float("-inf"), high), 0)))
    tl.store(mine + 5, tl.full([PROGRAMS], float("inf"), tl.float64))
    tl.store(mine + 6, tl.full([PROGRAMS], float("-inf"), tl.float64))
    units = tl.max(tl.load(mine + 7), 0).to(tl.int32)
    rows = tl.max(tl.load(mine + 8), 0).to(tl.int32)
    tl.store(mine + 7, tl.zeros([PROGRAMS], tl.float64))
    tl.store(mine + 8, tl.zeros([PROGRAMS], tl.float64))
    taken = units * rows
    tl.store(out + 7, taken.to(tl.float64))

    sample = samples + row * SAMPLE
    counts = tl.zeros([SPACE], tl.int32)
    for start in range(0, taken, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < taken
        value = tl.load(sample + place, mask=inside, other=0.0)
        bins, number = _bin(value, LOW, STEPS, HALVES, SIGNED)
        counts += tl.histogram(tl.where(inside & number, bins, COUNT), SPACE)
    bins = tl.arange(0, SPACE)
    tl.store(out + HEAD + bins, counts.to(tl.float64), mask=bins < COUNT)

    dead = tl.zeros([], tl.int32)
    stuck = tl.zeros([], tl.int32)
    if WATCH:
        zero = tl.load(limits + row * 3)
        bottom = tl.load(limits + row * 3 + 1)
        top = tl.load(limits + row * 3 + 2)
        for start in range(0, units, UNITS):
            unit = start + tl.arange(0, UNITS)
            inside = unit < units
            alive = tl.zeros([UNITS], tl.int32)
            free = tl.zeros([UNITS], tl.int32)
            for taken_row in range(rows):
                value = tl.load(sample + taken_row * units + unit, mask=inside, other=0.0)
                alive |= (tl.abs(value) > zero).to(tl.int32)
                free |= ((value > bottom) & (value < top)).to(tl.int32)
            run = runs + row * 2 * SAMPLE + unit
            zeros = tl.where(alive > 0, 0, tl.minimum(tl.load(run, mask=inside, other=0) + rows, ENOUGH))
            bound = tl.where(free > 0, 0, tl.minimum(tl.load(run + SAMPLE, mask=inside, other=0) + rows, ENOUGH))
            tl.store(run, zeros, mask=inside)
            tl.store(run + SAMPLE, bound, mask=inside)
            dead += tl.sum((inside & (zeros >= ENOUGH)).to(tl.int32), 0)
            stuck += tl.sum((inside & (bound >= ENOUGH)).to(tl.int32), 0)
    divisor = tl.maximum(units, 1).to(tl.float64)
    tl.store(out + 8, dead.to(tl.float64) / divisor)
    tl.store(out + 9, stuck.to(tl.float64) / divisor)


def finish(partials: Tensor, samples: Tensor, bins: Bins, limits: Tensor, runs: Tensor) -> Tensor:
    """See :meth:`workbench.probes.kernels.Tally.finish`; partial results are empty afterwards."""
    rows, programs, _ = partials.shape
    out = torch.empty(rows, HEAD.value + bins.count, dtype=torch.float64, device=partials.device)
    with torch.cuda.device_of(partials):
        _finish[(rows,)](
            partials, samples, limits, runs, out, samples.shape[1], COUNT=bins.count, LOW=bins.low, STEPS=bins.steps,
            HALVES=bins.per_octave == 2, SIGNED=bins.signed, WATCH=len(runs) > 0, PROGRAMS=programs,
            SPACE=triton.next_power_of_2(bins.count + 1), CHUNK=1024, UNITS=UNITS, num_warps=4,
        )  # fmt: skip
    return out


# -- what an update changed ------------------------------------------------------------------------------------------------


@triton.jit
def _change(base, offsets, layouts, samples, out, SAMPLE, BLOCK: tl.constexpr):
    tensor = tl.program_id(0).to(tl.int64)
    layout = layouts + tensor * 8
    row = tl.load(layout)
    positions = tl.load(layout + 5)
    rows = tl.load(layout + 6)
    step = tl.load(layout + 7)
    x = base + tl.multiple_of(tl.load(offsets + tensor), 8)
    moved = tl.zeros([BLOCK], tl.float64)
    size = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        element = start + tl.arange(0, BLOCK)
        inside = element < rows
        before = tl.load(samples + row * SAMPLE + element, mask=inside, other=0.0).to(tl.float64)
        after = tl.load(x + element * step % positions, mask=inside, other=0.0).to(tl.float64)
        moved += (after - before) * (after - before)
        size += before * before
    tl.store(out + tensor * 2, tl.sum(moved, 0))
    tl.store(out + tensor * 2 + 1, tl.sum(size, 0))


def change(plan: Plan, values: Sequence[Tensor], samples: Tensor) -> Tensor:
    """float64 [tensors, 2]: squares of what changed since the samples were taken, and of the samples, summed; no units."""
    out = torch.empty(len(values), 2, dtype=torch.float64, device=samples.device)
    with torch.cuda.device_of(samples):
        _change[(len(values),)](plan.base, plan.offsets(values), plan.layouts, samples, out, samples.shape[1], BLOCK=1024)
    return out
