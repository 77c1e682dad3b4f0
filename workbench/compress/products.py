"""Linear layers whose products are of 8-bit numbers, in ordinary operations that a compiler fuses with their neighbours.

* :class:`Int8Linear` — integers; :class:`Fp8Linear` — 8-bit floating point (E4M3).
* :class:`Range` — what calibration found of a layer's inputs. Without one, the scale of the inputs is taken at each call.

Rounding the input is elementwise where the range is known, and otherwise takes one largest magnitude a row: a compiler does it
in the kernel that computes the input (a normalization, an activation), which then writes half the bytes.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), for E4M3; Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference" (2018), for integers with a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.compress.observers import SMALLEST, weight_scale

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest number of each format that is used."""

_LEAST_ROWS = 17
"""The INT8 kernels of GPUs take no fewer rows; smaller inputs get rows of zeros."""


@dataclass(frozen=True)
class Range:
    """Scale of a layer's inputs, and the integer in −128 … 127 that stands for zero."""

    scale: float
    zero: int = 0


class EightBitLinear(nn.Module):
    """``x @ weight.T + bias`` with 8-bit ``values`` [out, in] in place of the weight; inputs [..., in] of any float type.

    Args:
        linear: the layer to copy.
        by_channel: one scale for each output (and for each row of the input, if it has no range), or one for all.
        inputs: range of the inputs.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    kind: torch.dtype

    def __init__(self, linear: nn.Linear, by_channel: bool, inputs: Range | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.by_channel = linear.in_features, linear.out_features, by_channel
        self.training = False
        weight = linear.weight.detach().float()
        scale = weight_scale(weight, by_channel) * (127 / LARGEST[self.kind])
        if self.kind.is_floating_point and not by_channel:  # layers of other powers of two are joined without rounding again
            scale = scale.log2().ceil().exp2()
        self.register_buffer("values", rounded(weight / scale[:, None], self.kind))
        self.register_buffer("scale", scale if by_channel else scale[0])
        self.register_buffer("input_scale", None if inputs is None else torch.tensor(inputs.scale, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] as numbers, for models that read it elsewhere too."""
        return self.values.float() * self.scale.reshape(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], of the input's type."""
        return self.product(x.reshape(-1, self.in_features).float()).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:
        """[M, in] fp32 -> [M, out]."""
        raise NotImplementedError(f"{type(self).__name__} must say how it multiplies.")

    def measured(self, rows: Tensor) -> Tensor:
        """Scale of the input rows [M, in] by their largest magnitudes: [M, 1], or [] without ``by_channel``."""
        largest = rows.abs().amax(1, keepdim=True) if self.by_channel else rows.abs().amax()
        return (largest / LARGEST[self.kind]).clamp(min=SMALLEST)

    def extra_repr(self) -> str:
        calibrated = "measured at each call" if self.input_scale is None else "calibrated"
        return f"{self.in_features}, {self.out_features}, inputs {calibrated}, by_channel={self.by_channel}"


class Fp8Linear(EightBitLinear):
    """8-bit floating point; outputs are computed in bfloat16."""

    kind = torch.float8_e4m3fn

    def __init__(self, linear: nn.Linear, by_channel: bool, inputs: Range | None = None) -> None:
        super().__init__(linear, by_channel, inputs)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def product(self, rows: Tensor) -> Tensor:
        by = self.measured(rows) if self.input_scale is None else self.input_scale
        values = rounded(rows / by, self.kind)
        if self.by_channel:  # the kernel takes a scale for each row, or none; one that is known is a constant, once compiled
            by = by.expand(len(rows), 1).contiguous()
        multiply = scaled_product if rows.is_cuda else scaled_product_in_float
        return multiply(values, by, self.values, self.scale[None] if self.by_channel else self.scale, self.bias)


class Int8Linear(EightBitLinear):
    """Integers, summed exactly; a zero point of the inputs is in the bias, so that it costs nothing."""

    kind = torch.int8
    bias: Tensor
    input_zero: Tensor

    def __init__(self, linear: nn.Linear, by_channel: bool, inputs: Range | None = None) -> None:
        super().__init__(linear, by_channel, inputs)
        bias = self.scale.new_zeros(self.out_features) if linear.bias is None else linear.bias.detach().float()
        if inputs is not None:
            bias = bias - inputs.scale * inputs.zero * self.scale * self.values.sum(1)
        self.register_buffer("bias", bias)
        self.register_buffer("input_zero", None if inputs is None else bias.new_tensor(float(inputs.zero)))

    def product(self, rows: Tensor) -> Tensor:
        if self.input_scale is None:
            by = self.measured(rows)
            return self._sums(rounded(rows / by, self.kind)) * (by * self.scale) + self.bias
        sums = self._sums(rounded(rows / self.input_scale + self.input_zero, self.kind))
        return sums * (self.input_scale * self.scale) + self.bias

    def _sums(self, values: Tensor) -> Tensor:
        """int8 [M, in] -> fp32 [M, out], exact up to 2²⁴."""
        missing = _LEAST_ROWS - len(values)
        if missing <= 0:
            return torch._int_mm(values, self.values.t()).float()
        return torch._int_mm(F.pad(values, (0, 0, 0, missing)), self.values.t())[: len(values)].float()


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """fp32 numbers as 8-bit ones, the nearest of those within reach."""
    if kind == torch.int8:
        return torch.round(x).clamp(-128, 127).to(kind)
    return x.clamp(-LARGEST[kind], LARGEST[kind]).to(kind)


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """FP8 [M, in] by [out, in] -> bfloat16 [M, out], on tensor cores.

    Args:
        x_scale, weight_scale: [M, 1] and [1, out], or both [].
        bias: bfloat16 [out].
    """
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def scaled_product_in_float(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`scaled_product` where there are no such tensor cores."""
    product = x.float() @ weight.float().t() * (x_scale * weight_scale)
    return (product if bias is None else product + bias).to(torch.bfloat16)
