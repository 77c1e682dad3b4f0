"""What torchao needs to be told: which values become INT8, and how their ranges are found. Imported when first used.

* :class:`Recipe` — the quantizer of x86 CPUs, with layers and operations left out.
* :class:`RangeObserver` — gathers what :class:`~workbench.compress.observers.Seen` holds, in two passes.
* :class:`WeightObserver` — symmetric scales of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig

from workbench.compress.observers import BINS, Seen, scale_and_zero_point, weight_scale
from workbench.compress.quantization_config import OBSERVERS, QuantConfig


class Recipe(x86.X86InductorQuantizer):  # type: ignore[misc]
    """Convolutions, linear layers and what lies between them in INT8, as Inductor's kernels expect it.

    Args:
        config: of bits, schemes and observers.
        leave: whether a node stays in floating point.
    """

    def __init__(self, config: QuantConfig, leave: Callable[[Node], bool]) -> None:
        super().__init__()
        self._leave = leave
        activation = QuantizationSpec(
            dtype=torch.uint8,
            quant_min=0,
            quant_max=2**config.activation_bit - 1,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=RangeObserver.with_args(config=config),
        )
        weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=WeightObserver.with_args(config=config),
        )
        self.set_global(QuantizationConfig(activation, None, weight, None))

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.op == "call_function" and self._leave(node):
                x86._annotate_nodes_not_quantize(node)  # a pattern with such a node in it is passed over
        annotated: GraphModule = super().annotate(model)
        return annotated


class RangeObserver(ObserverBase):  # type: ignore[misc]
    """Sees a value twice: its extremes in the first pass over the samples, its histogram in the second."""

    def __init__(self, config: QuantConfig, **spec: Any) -> None:
        super().__init__(dtype=spec["dtype"])
        self.qscheme, self.quant_min, self.quant_max = spec["qscheme"], spec["quant_min"], spec["quant_max"]
        self.config = config
        self.extremes: list[tuple[float, float]] = []
        self.counts: Tensor | None = None
        self.rounds: bool | None = None
        """None while it observes; then whether it rounds."""
        self._found: tuple[float, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds is not None:
            return self.rounded(x) if self.rounds else x
        values = x.detach().float()
        if self.counts is None:
            low, high = torch.aminmax(values)
            self.extremes.append((low.item(), high.item()))
        else:
            low, high = (edge(pair) for edge, pair in zip((min, max), zip(*self.extremes, strict=True), strict=True))
            self.counts += torch.histc(values, BINS, min=low, max=high)
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` as INT8 will hold it, by the range that calibration found."""
        if self._found is None:
            scale, zero = self.calculate_qparams()
            self._found = scale.item(), int(zero)
        return torch.fake_quantize_per_tensor_affine(x.float(), *self._found, self.quant_min, self.quant_max).to(x.dtype)

    def count(self) -> None:
        """Begin the second pass."""
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        if not self.extremes:
            return torch.tensor(1.0), torch.tensor(0)
        lows, highs = torch.tensor(self.extremes, dtype=torch.float64).unbind(1)
        counts = self.counts if self.counts is not None else torch.ones(BINS, dtype=torch.float64)
        low, high = OBSERVERS.factory(self.config.observer)(Seen(lows, highs, counts), self.config)
        return scale_and_zero_point(torch.tensor(low), torch.tensor(high), self.config)


class WeightObserver(ObserverBase):  # type: ignore[misc]
    """One symmetric scale for each output channel, or one value for all of them: kernels take a scale a channel either way."""

    def __init__(self, config: QuantConfig, **spec: Any) -> None:
        super().__init__(dtype=spec["dtype"])
        self.qscheme, self.quant_min, self.quant_max = spec["qscheme"], spec["quant_min"], spec["quant_max"]
        self.ch_axis = 0
        self.per_channel = config.by_channel
        self.scale = torch.ones(1)
        self.rounds: bool | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.rounds is not None:
            return self.rounded(weight) if self.rounds else weight
        self.scale = weight_scale(weight.detach(), self.per_channel)
        return weight

    def rounded(self, weight: Tensor) -> Tensor:
        """``weight`` as INT8 will hold it."""
        zero = torch.zeros(len(self.scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), self.scale.float(), zero, 0, -128, 127).to(weight.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, torch.zeros(len(self.scale), dtype=torch.int64)
