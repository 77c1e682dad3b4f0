"""Gradient norms by parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from workbench.distributed import local, stacked, sum_over_shards, whole_norms
from workbench.placement import to_device
from workbench.probes.base import Probe, StepContext
from workbench.probes.kernels import count_nonfinite


class GradientProbe(Probe):
    """By parameter: L2 norm and largest magnitude of the gradient, its non-finite elements, and the weight's L2 norm.

    Read after the last micro-step's backward pass and all-reduce, before clipping, with loss scaling undone: of the whole
    batch's gradient and of whole tensors, the same on every rank.
    """

    kind = "gradients"

    def attach(self, model: nn.Module) -> Callable[[], None]:
        self._names = [name for name, p in model.named_parameters() if p.requires_grad and self.wants(name)]
        self._model = model
        self._parameters: list[Tensor] = []
        return lambda: None

    @torch.no_grad()
    def read(self, context: StepContext) -> Tensor | None:
        """float64 [parameters, 4]: norm, max, nonfinite, weight_norm; NaN where a parameter got no gradient."""
        if not self._parameters:  # sharding puts others in the place of those that were there at first
            named = dict(self._model.named_parameters())
            self._parameters = [named[name] for name in self._names]
        present = [index for index, p in enumerate(self._parameters) if p.grad is not None]
        if not present:
            return None
        weights: list[Tensor] = [self._parameters[index] for index in present]
        gradients = [w.grad for w in weights if w.grad is not None]
        norm = whole_norms(gradients).double()
        largest = whole_norms(gradients, float("inf")).double()
        if context.scale is not None:
            scale = to_device(context.scale, norm.device)
            norm, largest = norm / scale, largest / scale
        nonfinite = sum_over_shards(stacked([count_nonfinite(local(g)) for g in gradients]).double(), gradients)
        weight_norm = whole_norms(weights).double()
        found = torch.stack([norm, largest, nonfinite, weight_norm], dim=1)
        if len(present) == len(self._parameters):
            return found
        rows = torch.full((len(self._parameters), 4), float("nan"), dtype=torch.float64, device=found.device)
        rows[torch.tensor(present, device=found.device)] = found
        return rows

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        reached = ~np.isnan(values[:, 3])  # a parameter that the step did not reach has nothing to tell
        names = [name for name, present in zip(self._names, reached, strict=True) if present]
        norm, largest, nonfinite, weight_norm = values[reached].T
        return {
            "step": [step] * len(names),
            "layer": names,
            "norm": norm,
            "max": largest,
            "nonfinite": nonfinite.astype(np.int64),
            "weight_norm": weight_norm,
        }
