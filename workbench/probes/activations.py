"""Distributions of layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from workbench.placement import to_device
from workbench.probes.base import EDGES, Probe, StepContext, computing_again
from workbench.probes.config import ProbeConfig
from workbench.probes.kernels import merged, new_partials, record, reset

SAMPLE = 4096
"""Most elements of a layer's output that its histogram counts; of larger outputs a strided sample. A bin that holds a share p of
the values then has a standard error of about sqrt(p (1 - p) / 4096), at most 0.8 points."""

_SKIPPED = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten)


class ActivationProbe(Probe):
    """By leaf layer: count, mean, standard deviation, smallest, largest, share of zeros, non-finite elements, histogram.

    Scalars are exact, summed in float64 over every element and micro-step of this rank's share; the histogram counts a strided
    sample of the last micro-batch. Hooks are installed before compilation and traced with the model: a step that reads runs a
    second compiled graph, in which each layer's output goes through one more operator; steps that don't read pay nothing.
    """

    kind = "activations"

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.active = False

    def attach(self, model: nn.Module) -> Callable[[], None]:
        layers = [
            (name, module)
            for name, module in model.named_modules()
            if not any(module.children()) and not isinstance(module, _SKIPPED) and self.wants(name)
        ]
        self._names = [name or type(model).__name__ for name, _ in layers]
        devices = dict.fromkeys(p.device for p in model.parameters()) or {torch.device("cpu"): None}
        self._stores = {device: _Store(len(layers), device) for device in devices}
        self._home = next(iter(self._stores))
        handles = [module.register_forward_hook(self._hook(row)) for row, (_, module) in enumerate(layers)]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def arm(self) -> None:
        super().arm()
        for store in self._stores.values():
            store.forget()
        self.active = True

    def _hook(self, row: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A plain attribute: the compiler guards on its value and keeps one graph with readings, one without.
            if self.active and not computing_again():
                value = output if isinstance(output, Tensor) else _first_tensor(output)
                if value is not None and value.numel() and value.is_floating_point():
                    value = value.detach()
                    if value.device not in self._stores:  # of a layer without weights, on a device without any
                        value = to_device(value, self._home)
                    store = self._stores[value.device]
                    record(value, store.partials, store.samples, row, sample_stride(value))

        return hook

    @torch.no_grad()
    def read(self, context: StepContext) -> Tensor | None:
        """float64 [layers, MOMENTS + bins]: the moments, then the counts of the bins."""
        self.active = False
        found = [store.read() for store in self._stores.values()]
        moments = torch.stack([to_device(part, self._home) for part, _ in found], dim=1)
        counts = torch.stack([to_device(part, self._home) for _, part in found])
        return torch.cat([merged(moments), counts.sum(0)], dim=1)

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        seen = values[:, 0] > 0  # a layer that the step did not reach has nothing to tell
        names = [name for name, present in zip(self._names, seen, strict=True) if present]
        count, total, square, zeros, nonfinite, low, high = values[seen, :7].T
        mean = total / count
        with np.errstate(invalid="ignore"):  # infinity less infinity: the spread of a layer that overflowed is no number
            std = np.sqrt(np.maximum(square / count - mean * mean, 0.0))
        return {
            "step": [step] * len(names),
            "layer": names,
            "count": count.astype(np.int64),
            "mean": mean,
            "std": std,
            "min": low,
            "max": high,
            "zeros": zeros / count,
            "nonfinite": nonfinite.astype(np.int64),
            "histogram": list(values[seen, 7:].astype(np.int32)),
        }


class _Store:
    """What is recorded on one device, of all layers; those that compute elsewhere leave their rows empty."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.partials = new_partials(rows, device)
        self.samples = torch.zeros(rows, SAMPLE, device=device)
        self._edges = torch.tensor(EDGES[1:-1], device=device)

    def forget(self) -> None:
        reset(self.partials)
        self.samples.fill_(float("nan"))

    def read(self) -> tuple[Tensor, Tensor]:
        """float64: moments [rows, MOMENTS], and counts [rows, bins]."""
        bins = len(EDGES) - 1
        place = torch.bucketize(self.samples, self._edges, right=True)
        place = torch.where(self.samples.isnan(), bins, place)  # unfilled, or not a number: counted nowhere
        counts = torch.zeros(len(place), bins + 1, dtype=torch.float64, device=place.device)
        counts.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))
        return merged(self.partials), counts[:, :bins]


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a tuple, list or dict of outputs (an LSTM's output sequence, say)."""
    members = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((member for member in members if isinstance(member, Tensor)), None)


def sample_stride(value: Tensor) -> int:
    """Step between sampled elements: spreads the sample over the whole, and shares no factor with any dimension.

    A step that shares a factor with the number of channels would see some channels only; a smaller one than it takes to reach
    the end, the first samples of the batch only.
    """
    stride = max(1, math.ceil(value.numel() / SAMPLE))
    while any(size > 1 and math.gcd(stride, size) > 1 for size in value.shape):
        stride += 1
    return stride
