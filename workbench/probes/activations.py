"""Distributions of layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from workbench.distributed import local
from workbench.placement import to_device
from workbench.probes.base import ACTIVATIONS, Probe, StepContext, computing_again
from workbench.probes.config import ActivationProbeConfig, ProbeConfig
from workbench.probes.kernels import HEAD, Tallies, record

SAMPLE = {"cpu": 4096, "cuda": 16384}
"""Most elements of a layer's output that its histogram and its units are read from: all units at positions spread over the
batch. A bin that holds a share p of the values then has a standard error of about sqrt(p (1 - p) / SAMPLE), at most 0.8 points on
a CPU and 0.4 on a GPU, more where units at one position are alike."""

_SKIPPED = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten)
_BY_CHANNEL = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_BY_FEATURE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase)


class ActivationProbe(Probe):
    """By leaf layer: count, mean, standard deviation, smallest, largest, share of zeros, non-finite elements, histogram
    (:data:`workbench.probes.base.ACTIVATIONS`), and shares of its units (channels or features) that are ``dead``: nothing
    but zero, or ``saturated``: nothing but values at a bound of their activation, in 64 values sampled in a row or more.

    Scalars are of every element and micro-step of this rank's share, summed in float64 (on CUDA, numbers of 16 bits four at a
    time in float32 first: 2e-7 of the sum of magnitudes); histogram and units are of a sample of the last micro-batch,
    ``sampled`` elements. With ``moments="sampled"`` the scalars, too, are of that sample, which alone is read then, and ``count``
    says so: a mean then has a standard error of std / sqrt(sampled), a standard deviation one of about 0.7 of that. ``error`` is
    the largest standard error of a bin's share.

    Hooks are installed before compilation and traced with the model: a step that reads runs a second compiled graph, in which
    each layer's output goes through one more operator; steps that don't read pay nothing. In eager steps the outputs of several
    layers are read by one launch.
    """

    kind = "activations"

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.active = False
        self._exact = not isinstance(config, ActivationProbeConfig) or config.moments == "exact"

    def attach(self, model: nn.Module) -> Callable[[], None]:
        layers: list[tuple[str, nn.Module, int]] = []
        dim = -1
        for name, module in model.named_modules():
            if any(module.children()) or isinstance(module, _SKIPPED):
                continue
            if isinstance(module, _BY_CHANNEL + _BY_FEATURE):
                dim = 1 if isinstance(module, _BY_CHANNEL) else -1
            if self.wants(name, module):
                layers.append((name, module, dim))
        self._names = [name or type(model).__name__ for name, _, _ in layers]
        devices = list(dict.fromkeys(p.device for p in model.parameters())) or [torch.device("cpu")]
        limits = [limits_of(module) for _, module, _ in layers]
        self._tallies = Tallies(devices, [dim for _, _, dim in layers], SAMPLE, ACTIVATIONS, limits, self._exact)
        handles = [module.register_forward_hook(self._hook(row)) for row, (_, module, _) in enumerate(layers)]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def arm(self) -> None:
        super().arm()
        self.active = True

    def _hook(self, row: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A plain attribute: the compiler guards on its value and keeps one graph with readings, one without.
            if self.active and not computing_again():
                value = output if isinstance(output, Tensor) else _first_tensor(output)
                if value is not None and value.numel() and value.is_floating_point():
                    value = value.detach()
                    if value.device not in self._tallies.by_device:  # of a layer without weights, on a device without any
                        value = to_device(value, self._tallies.home)
                    tally = self._tallies.by_device[value.device]
                    if torch.compiler.is_compiling():
                        record(value, tally.partials, tally.samples, row, tally.dims[row], tally.exact)
                    else:
                        tally.later(row, local(value))

        return hook

    @torch.no_grad()
    def read(self, context: StepContext) -> Tensor | None:
        """float64 [layers, HEAD + bins], as :meth:`Tally.finish` gives it."""
        self.active = False
        return self._tallies.finish() if self._names else None

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        seen = values[:, 0] > 0  # a layer that the step did not reach has nothing to tell
        names = [name for name, present in zip(self._names, seen, strict=True) if present]
        count, total, square, zeros, nonfinite, low, high, sampled, dead, saturated = values[seen, :HEAD].T
        mean = total / count
        with np.errstate(invalid="ignore", over="ignore"):  # infinity less infinity: an overflowed layer's spread is no number
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
            "dead": dead,
            "saturated": saturated,
            "sampled": sampled.astype(np.int64),
            "error": 0.5 / np.sqrt(sampled),
            "histogram": list(values[seen, HEAD:].astype(np.int32)),
        }


def limits_of(module: nn.Module) -> tuple[float, float, float]:
    """The magnitude up to which an output of ``module`` passes as zero, and the bounds between which it is free to move.

    Smooth activations never give a plain zero: GELU, SiLU and Mish are held to be at zero within 0.001, bounded ones to be at
    their bound within a hundredth of their range.
    """
    bounds = -math.inf, math.inf
    match module:
        case nn.Tanh() | nn.Softsign():
            bounds = -0.99, 0.99
        case nn.Sigmoid() | nn.Hardsigmoid():
            bounds = 0.01, 0.99
        case nn.ReLU6():  # its lower bound is zero: dead, not saturated
            bounds = -math.inf, 5.94
        case nn.Hardtanh():
            edge = 0.01 * (module.max_val - module.min_val)
            bounds = module.min_val + edge, module.max_val - edge
        case nn.ELU() | nn.CELU():
            bounds = -0.99 * module.alpha, math.inf
    return (1e-3 if isinstance(module, nn.GELU | nn.SiLU | nn.Mish) else 0.0), *bounds


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a tuple, list or dict of outputs (an LSTM's output sequence, say)."""
    members = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((member for member in members if isinstance(member, Tensor)), None)
