"""Gradients by parameter, and what the update made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from workbench.distributed import local, sum_over_shards
from workbench.placement import to_device
from workbench.probes.base import GRADIENTS, Probe, StepContext
from workbench.probes.kernels import HEAD, Tallies

SAMPLE = 4096
"""Most elements of a parameter that its histogram and its update are read from; of larger ones a sample. A bin that holds a
share p of the elements then has a standard error of about sqrt(p (1 - p) / 4096), at most 0.8 points; the update ratio one of
about 1 to 3 %, since both of its norms are of the same elements."""


class GradientProbe(Probe):
    """By parameter, of its gradient: L2 norm, mean, standard deviation, largest magnitude, share of zeros, non-finite elements,
    and a histogram of magnitudes by octaves (:data:`workbench.probes.base.GRADIENTS`); the weight's L2 norm; and
    ``update_ratio``, the L2 norm of the weight's change in this step over that of the weight before.

    Read after the last micro-step's backward pass and all-reduce, before clipping, with loss scaling undone: of the whole batch's
    gradient and of whole tensors, the same on every rank. Histograms alone are of the numbers as they were computed, times
    ``scale``. All scalars but the update ratio are exact, summed in float64 over every element.
    """

    kind = "gradients"

    def attach(self, model: nn.Module) -> Callable[[], None]:
        self._names = [name for name, p in model.named_parameters() if p.requires_grad and self.wants(name)]
        self._model = model
        self._parameters: list[Tensor] = []
        self._present: list[int] = []
        return lambda: None

    @torch.no_grad()
    def read(self, context: StepContext) -> Tensor | None:
        if not self._parameters:  # sharding puts others in the place of those that were there at first
            named = dict(self._model.named_parameters())
            self._parameters = [named[name] for name in self._names]
            if self._parameters:
                devices = list(dict.fromkeys(local(p).device for p in self._parameters))
                self._tallies = Tallies(devices, [0] * (2 * len(self._names)), {"cpu": SAMPLE}, GRADIENTS)
        self._present = [index for index, p in enumerate(self._parameters) if p.grad is not None]
        self._scale = None if context.scale is None else to_device(context.scale.double(), self._tallies.home)
        weights = [self._parameters[index] for index in self._present]
        parts = [local(w.grad) for w in weights if w.grad is not None] + [local(w.detach()) for w in weights]
        rows = self._present + [len(self._names) + index for index in self._present]
        filled = [place for place, part in enumerate(parts) if part.numel()]  # a small tensor leaves some ranks without any of it
        self._tallies.record_all([rows[place] for place in filled], [parts[place] for place in filled]) if filled else None
        return None

    @torch.no_grad()
    def updated(self, context: StepContext) -> Tensor | None:
        """float64 [parameters, 10 + bins]; a count of 0 where a parameter got no gradient."""
        if not self._present:
            return None
        names, weights = len(self._names), [self._parameters[index] for index in self._present]
        filled = [index for index, w in zip(self._present, weights, strict=True) if local(w).numel()]
        changes = torch.zeros(names, 2, dtype=torch.float64, device=self._tallies.home)
        if filled:
            found = self._tallies.change([names + i for i in filled], [local(self._parameters[i].detach()) for i in filled])
            changes = found if len(filled) == names else changes.index_copy(0, _index(filled, changes), found)
        found = self._tallies.finish()
        gradients, squares = found[:names], found[names:, 2:3]
        sums = torch.cat([gradients[:, :5], squares, changes, gradients[:, HEAD:]], dim=1)
        largest = gradients[:, 5:7].abs().amax(1)
        if len(self._present) == names:
            sums, largest = sum_over_shards(sums, weights), sum_over_shards(largest, weights, largest=True)
        else:
            place = _index(self._present, sums)
            sums = sums.index_copy(0, place, sum_over_shards(sums[place], weights))
            largest = largest.index_copy(0, place, sum_over_shards(largest[place], weights, largest=True))
        scale = torch.ones_like(largest) if self._scale is None else self._scale.expand_as(largest)
        return torch.cat([largest[:, None], scale[:, None], sums], dim=1)

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        reached = values[:, 2] > 0  # a parameter that the step did not reach has nothing to tell
        names = [name for name, present in zip(self._names, reached, strict=True) if present]
        largest, scale, count, total, square, zeros, nonfinite, weight, moved, before = values[reached, :10].T
        mean = total / count
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            spread = np.sqrt(np.maximum(square / count - mean * mean, 0.0))
            ratio = np.sqrt(moved / before)  # NaN of a weight that is all zeros
        return {
            "step": [step] * len(names),
            "layer": names,
            "norm": np.sqrt(square) / scale,
            "max": largest / scale,
            "mean": mean / scale,
            "std": spread / scale,
            "zeros": zeros / count,
            "nonfinite": nonfinite.astype(np.int64),
            "weight_norm": np.sqrt(weight),
            "update_ratio": ratio,
            "scale": scale,
            "histogram": list(values[reached, 10:].astype(np.int32)),
        }


def _index(rows: list[int], beside: Tensor) -> Tensor:
    found = torch.tensor(rows)
    return (found.pin_memory() if beside.is_cuda else found).to(beside.device, non_blocking=True)
