"""What probes add up of tensors, in one pass: Triton kernels on CUDA, torch's own operations elsewhere, the same numbers.

* :class:`Tally` — a row a tensor: moments of every element, and a sample of them; or moments of the sample, which alone is read
  then. Tensors are recorded at once, or several
  by one launch (:meth:`Tally.later`, :meth:`Tally.record_all`); :meth:`Tally.finish` gives what was found and starts anew.
* :class:`Tallies` — one on each of the devices that a model lies on.
* :class:`Plan` — what stays the same of tensors that are recorded together.
* :func:`record` — one opaque operator for compiled models: ``torch.compile`` neither breaks its graph there nor tries to fuse
  reductions over every layer of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workbench.placement import to_device
from workbench.probes.bins import Bins
from workbench.probes.sampling import SHAPES, Layout, in_memory_order, layout_of

PROGRAMS = 256
"""Parallel partial results of a row on CUDA, at most; merged by :meth:`Tally.finish`."""

FIELDS = 9
"""Of a partial result: count, sum, sum of squares, zeros, non-finite elements, smallest, largest; the sample's units and rows."""

MOMENTS = 7
"""Of these, what all elements add up to."""

HEAD = MOMENTS + 3
"""Columns of :meth:`Tally.finish` before the histogram: the moments, elements of the sample, shares of dead and stuck units."""

ENOUGH = 64
"""Sampled values without another one between them by which a unit is held to be dead, or stuck at a bound. One that is alive
for a share p of its values goes for dead with a probability of (1 - p)^64: 4 % for p = 0.05, 0.1 % for p = 0.1."""

CHUNK = 1 << 16
"""Elements of a program's share when several tensors are recorded by one launch."""

SHARE = 1 << 10
"""The same where samples alone are read."""


class Tally:
    """Moments and samples of tensors, by row, on one device.

    Args:
        dims: by row, the dimension that a tensor's units lie along: 1 for channels of images, -1 for features; 0 for none.
        sample: most elements of a row's sample.
        bins: of the samples' histograms.
        limits: by row: the magnitude up to which a value counts as zero, and the bounds between which it is free. With them,
            units are watched over readings: whether they put out nothing but zero, or nothing but values at a bound.
        exact: moments are of all elements; else of the samples.

    Attributes:
        partials: float64 [rows, programs, FIELDS].
        samples: float32 [rows, sample]; of each row, as many are filled as its partial results say.
    """

    BATCH = 1 << 28
    """Bytes of tensors that wait to be recorded by one launch, at most: they are kept alive for so long."""

    def __init__(
        self,
        dims: Sequence[int],
        sample: int,
        bins: Bins,
        device: torch.device,
        limits: Sequence[tuple[float, float, float]] | None = None,
        exact: bool = True,
    ) -> None:
        self.dims, self.bins, self.exact = list(dims), bins, exact
        rows, programs = len(dims), PROGRAMS if device.type == "cuda" else 1
        self.partials = torch.zeros(rows, programs, FIELDS, dtype=torch.float64, device=device)
        self.samples = torch.zeros(rows, sample, device=device)
        beside = device if device.type == "cuda" else torch.device("cpu")  # where what was recorded is finished
        self.limits = torch.tensor(limits or [(0.0, -math.inf, math.inf)] * rows, device=beside).reshape(rows, 3)
        self.runs = torch.zeros(rows if limits is not None else 0, 2, sample, dtype=torch.int32, device=beside)
        """By unit: sampled values since the last one that was not zero, and since the last one that was free."""
        self._reset()
        for tensor in (self.partials, self.samples):  # else graphs that write there would not be captured
            torch._dynamo.mark_static_address(tensor)
        self._waiting: list[tuple[int, Tensor, int]] = []
        self._bytes = 0
        self._known: set[int] = set()
        self._at_once: set[int] = set()
        self._plans: dict[Any, Plan] = {}

    # -- taking in ----------------------------------------------------------------------------------------------------

    def record(self, row: int, value: Tensor) -> None:
        """Add the elements of ``value``, floating point and not empty, to a row; its sample takes the place of an earlier one."""
        record_now(value, self.partials, self.samples, row, self.dims[row], self.exact)

    def later(self, row: int, value: Tensor) -> None:
        """The same, with others by one launch, at the latest by :meth:`finish`; ``value`` is kept alive for so long.

        What is changed in place meanwhile has to be recorded at once. Which tensors are, the first reading shows, in which all
        are recorded at once; where that changes later, one reading of the tensor is lost.
        """
        known = row in self._known
        if row in self._at_once or not known:
            self.record(row, value)
        if row not in self._at_once:
            self._waiting.append((row if known else ~row, value, value._version))
            self._bytes += value.nbytes
            if self._bytes > self.BATCH:
                self.flush()

    def flush(self) -> None:
        """Record what waits."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        rows: list[int] = []
        values: list[Tensor] = []
        for key, value, version in waiting:
            row = max(key, ~key)
            self._known.add(row)
            if value._version != version:
                self._at_once.add(row)
            elif key >= 0:
                rows.append(row)
                values.append(value)
        if rows:
            self.record_all(rows, values)

    def record_all(self, rows: Sequence[int], values: Sequence[Tensor]) -> None:
        """Add each of ``values`` to its row; on CUDA by one launch for those of one type."""
        plans, apart = self._planned(rows, values)
        for plan, places in plans:
            _cuda().record_all(plan, [values[place] for place in places], self.partials, self.samples, exact=self.exact)
        for place in apart:
            self.record(rows[place], values[place])

    def change(self, rows: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        """How much tensors changed since they were recorded, by their samples; of rows without units.

        Returns:
            float64 [rows, 2]: sums of squares of the changes, and of the values before.
        """
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=self.partials.device)
        plans, apart = self._planned(rows, values)
        for plan, places in plans:
            of = _cuda().change(plan, [values[place] for place in places], self.samples)
            if len(places) == len(rows):
                return of
            found[torch.tensor(places, device=found.device)] = of
        for place in apart:
            layout = layout_of(values[place], 0, self.samples.shape[1])
            after = in_memory_order(values[place]).reshape(-1)[layout.places(found.device)].double()
            before = self.samples[rows[place], : layout.rows].double()
            found[place, 0], found[place, 1] = (after - before).square().sum(), before.square().sum()
        return found

    def _planned(self, rows: Sequence[int], values: Sequence[Tensor]) -> tuple[list[tuple[Plan, list[int]]], list[int]]:
        """Places of tensors that one launch serves, by type, with what stays the same of them; and of those left over."""
        by_type: dict[torch.dtype, list[int]] = {}
        apart: list[int] = []
        for place, value in enumerate(values):
            if value.is_cuda and value.dtype in TYPES and value.data_ptr() % 32 == 0 and _is_dense(value):
                by_type.setdefault(value.dtype, []).append(place)
            else:
                apart.append(place)
        found = []
        for dtype, places in by_type.items():
            key = (dtype, *((rows[place], values[place].shape, values[place].stride()) for place in places))
            if key not in self._plans:
                if len(self._plans) >= SHAPES:
                    self._plans.pop(next(iter(self._plans)))
                sample = self.samples.shape[1]
                layouts = [layout_of(values[place], self.dims[rows[place]], sample) for place in places]
                self._plans[key] = Plan([rows[place] for place in places], layouts, dtype, self.samples.device, self.exact)
            found.append((self._plans[key], places))
        return found, apart

    # -- giving out ---------------------------------------------------------------------------------------------------

    def finish(self) -> Tensor:
        """What was found since the last time, float64 [rows, HEAD + bins]; of rows that nothing was added to, the count is 0."""
        self.flush()
        if self.partials.is_cuda:
            found: Tensor = _cuda().finish(self.partials, self.samples, self.bins, self.limits, self.runs)
            return found
        partials, samples = self.partials[:, 0].cpu(), self.samples.cpu()
        units, taken = partials[:, 7].long(), partials[:, 8].long()
        seen = units * taken
        inside = torch.arange(samples.shape[1]) < seen[:, None]
        place = torch.where(inside, self.bins.place(samples), self.bins.count)
        counts = torch.zeros(len(seen), self.bins.count + 1, dtype=torch.float64)
        counts.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))
        still = torch.zeros(len(seen), 2, dtype=torch.float64)
        for row in torch.nonzero(seen).flatten().tolist() if len(self.runs) else ():
            still[row] = self._still(row, samples[row, : int(seen[row])].view(int(taken[row]), -1))
        found = torch.cat([partials[:, :MOMENTS], seen[:, None], still, counts[:, : self.bins.count]], dim=1)
        self._reset()
        return found

    def _still(self, row: int, sample: Tensor) -> Tensor:
        """float64 [2]: shares of the row's units that are dead, and that are stuck at a bound, by a sample [rows, units]."""
        taken, units = sample.shape
        zero, low, high = self.limits[row]
        moved = torch.stack([(sample.abs() > zero).any(0), ((sample > low) & (sample < high)).any(0)])
        runs = torch.where(moved, 0, (self.runs[row, :, :units] + taken).clamp(max=ENOUGH))
        self.runs[row, :, :units] = runs
        return (runs >= ENOUGH).double().mean(1)

    def _reset(self) -> None:
        self.partials.zero_()
        self.partials[..., 5] = math.inf
        self.partials[..., 6] = -math.inf


class Tallies:
    """A tally on each of the devices that a model's layers lie on; the first is where what was found comes together.

    Args:
        devices: at least one, each once.
        dims, sample, bins, limits, exact: as of :class:`Tally`; by the type of the device, the sample.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        dims: Sequence[int],
        sample: Mapping[str, int],
        bins: Bins,
        limits: Sequence[tuple[float, float, float]] | None = None,
        exact: bool = True,
    ) -> None:
        self.home = devices[0]
        sizes = {each: sample.get(each.type, sample["cpu"]) for each in devices}
        self.by_device = {each: Tally(dims, size, bins, each, limits, exact) for each, size in sizes.items()}

    def record_all(self, rows: Sequence[int], values: Sequence[Tensor]) -> None:
        for tally, places in self._divided(values):
            tally.record_all([rows[place] for place in places], [values[place] for place in places])

    def change(self, rows: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        """See :meth:`Tally.change`."""
        parts = [
            (places, tally.change([rows[place] for place in places], [values[place] for place in places]))
            for tally, places in self._divided(values)
        ]
        if len(parts) == 1:
            return parts[0][1]
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=self.home)
        for places, part in parts:
            found[to_device(torch.tensor(places), self.home)] = to_device(part, self.home)
        return found

    def finish(self) -> Tensor:
        """See :meth:`Tally.finish`."""
        found = [to_device(tally.finish(), self.home) for tally in self.by_device.values()]
        if len(found) == 1:
            return found[0]
        parts = torch.stack(found)
        together = parts.sum(0)  # a row is of one device; the others have nothing in it
        together[:, 5], together[:, 6] = parts[..., 5].amin(0), parts[..., 6].amax(0)
        return together

    def _divided(self, values: Sequence[Tensor]) -> list[tuple[Tally, list[int]]]:
        places: dict[torch.device, list[int]] = {}
        for place, value in enumerate(values):
            places.setdefault(value.device, []).append(place)
        return [(self.by_device[device], found) for device, found in places.items()]


TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""That several tensors of can be recorded by one launch."""


class Plan:
    """What stays the same of tensors that are recorded together, on the device.

    Args:
        exact: all elements are read; else the samples.

    Attributes:
        layouts: int64 [tensors, 8]: row, programs, then the fields of :class:`Layout`.
        work: int32 [programs of all, 2]: tensor, and which of its programs.
        base: empty, of the tensors' type; they are addressed from there.
    """

    def __init__(
        self, rows: Sequence[int], layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device, exact: bool = True
    ) -> None:
        read = [(layout.count, CHUNK) if exact else (layout.units * layout.rows, SHARE) for layout in layouts]
        programs = [min(PROGRAMS, -(-count // share)) for count, share in read]
        fields = [
            (row, of, one.count, one.units, one.inner, one.positions, one.rows, one.step)
            for row, of, one in zip(rows, programs, layouts, strict=True)
        ]
        work = [(tensor, program) for tensor, of in enumerate(programs) for program in range(of)]
        self.layouts = torch.tensor(fields, dtype=torch.int64, device=device)
        self.work = torch.tensor(work, dtype=torch.int32, device=device)
        self.base = torch.empty(16, dtype=dtype, device=device)

    def offsets(self, values: Sequence[Tensor]) -> Tensor:
        """int64 [tensors], on the device: elements from :attr:`base` to each tensor, without waiting."""
        base, size = self.base.data_ptr(), self.base.element_size()
        host = torch.tensor([(value.data_ptr() - base) // size for value in values], dtype=torch.int64)
        if self.base.is_cuda:
            host = host.pin_memory()
        return host.to(self.base.device, non_blocking=True)


def record_now(value: Tensor, partials: Tensor, samples: Tensor, row: int, dim: int, exact: bool) -> None:
    """See :meth:`Tally.record`."""
    flat, layout = in_memory_order(value).reshape(-1), layout_of(value, dim, samples.shape[1])
    if value.is_cuda:
        _cuda().record(flat, layout, partials[row], samples[row], exact=exact)
        return
    sample = flat[layout.places(flat.device)]
    samples[row, : len(sample)] = sample
    seen = flat if exact else sample
    total, norm = seen.sum(dtype=torch.float64), torch.linalg.vector_norm(seen, dtype=torch.float64)
    zeros, broken = len(seen) - torch.count_nonzero(seen), count_nonfinite(seen)
    low, high = torch.aminmax(seen)
    partials[row, 0, :5] += torch.stack([torch.full_like(total, len(seen)), total, norm * norm, zeros, broken])
    partials[row, 0, 5] = torch.minimum(partials[row, 0, 5], low.double())
    partials[row, 0, 6] = torch.maximum(partials[row, 0, 6], high.double())
    partials[row, 0, 7], partials[row, 0, 8] = layout.units, layout.rows


@torch.library.custom_op("workbench::record", mutates_args=("partials", "samples"))
def record(value: Tensor, partials: Tensor, samples: Tensor, row: int, dim: int, exact: bool) -> None:
    """:func:`record_now` as one operator of a compiled graph."""
    record_now(value, partials, samples, row, dim, exact)


def count_nonfinite(value: Tensor) -> Tensor:
    """Number of NaN and infinite elements, a scalar int64 tensor."""
    return torch.count_nonzero(value - value)  # a finite number less itself is zero; NaN and infinities give NaN


def _is_dense(value: Tensor) -> bool:
    return value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))


@cache
def _cuda() -> Any:
    """The CUDA kernels. Triton is imported on first use: it comes with CUDA builds only."""
    from workbench.probes import triton_kernels

    return triton_kernels
