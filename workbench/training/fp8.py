"""Linear layers that multiply in FP8 while a model trains (Micikevicius et al. 2022, arXiv:2209.05433).

* :func:`choose` says which of a model's linear layers do, and why the others don't: a :class:`Choice`.
* :func:`convert` makes them :class:`Float8Linear` and gives back how to undo it.

Weights and inputs are rounded to e4m3 (4 bits of exponent, 3 of mantissa), gradients to e5m2; each tensor is scaled by its own
largest magnitude at every step, so that nothing overflows and no loss need be scaled. Sums are fp32. Whatever else the model
computes is bf16 autocast; weights, their gradients and the optimizer's state are fp32.

Why not ``torchao.float8.convert_to_float8_training``, whose arithmetic this is: it puts other modules in the place of the linear
layers, and leaves hooks, references and the way back behind. Here the module stays, and with it its name, its parameters and its
hooks; only its class is another one for a while. What is kept for the backward pass is the FP8 input, half of a bf16 one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from workbench.errors import DeviceError, ModelError

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
"""Types of weights and inputs, and of gradients (arXiv:2209.05433, section 3)."""

GRAIN = 16
"""Sizes of an FP8 product must be multiples of it: cuBLASLt reads 16 bytes at a time."""

BALANCE = 220.0
"""Operations in bf16 that a GPU does while it moves a byte, in practice: on an H100 two thirds of 989 TFLOP/s to nine tenths of
3.35 TB/s."""

EMULATED = "WORKBENCH_FP8"
"""Environment variable: ``emulate`` lets a CPU compute ``precision="fp8"`` with the same rounding, slowly, in every layer whose
sizes fit."""


def emulated() -> bool:
    return os.environ.get(EMULATED) == "emulate"


def lacking(device: torch.device) -> str | None:
    """Why a device can't multiply in FP8; None if it can."""
    if device.type != "cuda":
        return None if emulated() else "this run is on a CPU"
    if torch.version.hip is not None:
        return f"{torch.cuda.get_device_name(device)} is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def check_device(device: torch.device) -> None:
    """Refuse a device without FP8 arithmetic.

    Raises:
        DeviceError: with its compute capability.
    """
    if (missing := lacking(device)) is not None:
        raise DeviceError(
            f"precision='fp8' needs an NVIDIA GPU of compute capability 8.9 or above, and {missing}.", "Take bf16, or fp32."
        )


# -- arithmetic -----------------------------------------------------------------------------------------------------


def rounded(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` as an FP8 tensor and the fp32 scalar that it is to be multiplied by.

    The largest magnitude becomes the largest number of the type, so nothing is cut off; what isn't finite becomes NaN, and is
    told of as such. There is no minimum or maximum to take: Inductor's code for these next to FP8 stores is not to be trusted
    (see :func:`_mend_compiler`).
    """
    scale = x.abs().amax().float() / torch.finfo(kind).max
    scale = torch.where(scale > 0, scale, 1.0)
    return (x.float() / scale).to(kind).contiguous(), scale


class _Product(torch.autograd.Function):
    """``x @ weight.T`` for x [M, K] and weight [N, K], all three products of a step in FP8; M, K and N are multiples of 16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = rounded(x, INPUT)
        w8, w_scale = rounded(weight, INPUT)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        # As torchao's: sums of the forward pass may be kept in the tensor cores' own, shorter registers.
        return torch._scaled_mm(x8, w8.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = rounded(gradient, GRADIENT)
        to_x = to_weight = None
        # The first operand is to lie in memory by rows, the second by columns.
        if ctx.needs_input_grad[0]:
            by_columns = w8.t().contiguous().t()
            to_x = torch._scaled_mm(g8, by_columns, scale_a=g_scale, scale_b=w_scale, out_dtype=gradient.dtype)
        if ctx.needs_input_grad[1]:
            by_rows, by_columns = g8.t().contiguous(), x8.t().contiguous().t()
            to_weight = torch._scaled_mm(by_rows, by_columns, scale_a=g_scale, scale_b=x_scale, out_dtype=torch.float32)
        return to_x, to_weight


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8; its output is of the type that autocast would give."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.reshape(-1, self.in_features)
        count = len(rows)
        if missing := -count % GRAIN:  # rows of zeros change no sum
            rows = F.pad(rows, (0, 0, 0, missing))
        with torch.autocast(device, enabled=False):  # a CPU multiplies by other operations, whose inputs it would round again
            y: Tensor = _Product.apply(rows, self.weight)
        y = y[:count].view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# -- which layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which linear layers of a model multiply in FP8.

    Attributes:
        layers: those, by name.
        others: why the others don't, by name.
        largest: the largest of the others, by the number of weights; None where there are none.
    """

    layers: dict[str, nn.Linear]
    others: dict[str, str]
    largest: str | None = None

    def check(self, model: nn.Module) -> Choice:
        """Itself.

        Raises:
            ModelError: there is no layer to compute in FP8.
        """
        if not self.layers:
            why = f": the largest, {self.largest!r}, is {self.others[self.largest]}" if self.largest is not None else ""
            raise ModelError(
                f"precision='fp8' makes linear layers faster, and none of this {type(model).__name__}{why}.",
                "Take bf16; or wider layers (multiples of 16), or more samples a step.",
            )
        return self

    @property
    def told(self) -> str:
        """How many layers do, and why the others don't, in words."""
        text = f"{len(self.layers)} of {len(self.layers) + len(self.others)} linear layers multiply in FP8"
        reasons = dict.fromkeys(self.others.values())
        rest = [f"{_summary(name for name, why in self.others.items() if why == reason)} ({reason})" for reason in reasons]
        return text + (f"; in bf16 stay {', '.join(rest)}" if rest else "")


def gains(rows: int, inputs: int, outputs: int) -> bool:
    """Whether a linear layer's products are large enough to gain by FP8.

    FP8 halves the time of the three products of a step, 6 · rows · inputs · outputs operations. For it, inputs and gradients are
    read twice and written twice in FP8 (6 bytes an element), weights the same (about 12). With :data:`BALANCE` operations in the
    time of a byte, the first is more than the second where 2/inputs + 2/outputs + 4/rows < 1/BALANCE: for many rows, layers of
    768 × 2304 or 1024 × 1024, but none of 768 × 768. The derivation is that of torchao's ``float8/README.md``, and gives what it
    measured on an H100: 2048 × 1024 with 1,024 rows loses (0.80 times as fast), 8192 × 16384 with 4,096 gains (1.39 times).
    """
    return 2 / inputs + 2 / outputs + 4 / rows < 1 / BALANCE


@torch.no_grad()
def choose(model: nn.Module, example: Any, count: int, samples: int, around: Callable[[], AbstractContextManager[Any]]) -> Choice:
    """The layers of ``model`` that FP8 makes faster, by one small forward pass; the model stays as it is.

    All plain ``nn.Linear`` whose sizes are multiples of :data:`GRAIN` and that :func:`gains` says to, but for the output layer,
    the last layer with weights to compute: it stays bf16, as is usual, since its rounding goes into every prediction.

    Args:
        example: ``count`` samples, on the model's device.
        samples: of a micro-step on this rank.
        around: what the forward pass runs in.
    """
    order: list[nn.Module] = []
    rows: dict[nn.Module, int] = {}

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        order.append(module)
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            rows[module] = max(rows.get(module, 0), output.numel() // module.out_features * samples // count)

    modes = [(module, module.training) for module in model.modules()]
    single = [module for module in model.modules() if not any(module.children()) and any(True for _ in module.parameters())]
    hooks = [module.register_forward_hook(seen) for module in single]
    try:
        model.eval()
        with around():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    layers: dict[str, nn.Linear] = {}
    others: dict[str, str] = {}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in linear.items():
        why = _objection(layer, rows.get(layer), bool(order) and layer is order[-1])
        if why is None:
            layers[name] = layer
        else:
            others[name] = why
    return Choice(layers, others, max(others, key=lambda name: linear[name].weight.numel(), default=None))


def _objection(layer: nn.Linear, rows: int | None, last: bool) -> str | None:
    size = f"{layer.in_features} × {layer.out_features}"
    if type(layer) not in (nn.Linear, Float8Linear):
        return f"a {type(layer).__name__}, which computes in its own way"
    if rows is None:
        return "not called as a layer"
    if last:
        return "the output layer"
    if layer.in_features % GRAIN or layer.out_features % GRAIN:
        return f"{size}, not multiples of {GRAIN}"
    if not emulated() and not gains(rows, layer.in_features, layer.out_features):
        return f"{size} with {rows:,} rows a step, too small to gain more than rounding costs"
    return None


def convert(layers: Iterable[nn.Linear]) -> Callable[[], None]:
    """Let layers multiply in FP8, in place, until what is returned is called; those that already do are left alone."""
    changed = [layer for layer in layers if type(layer) is nn.Linear]
    if any(layer.weight.is_cuda for layer in changed):
        _mend_compiler()
    for layer in changed:
        layer.__class__ = Float8Linear

    def undo() -> None:
        while changed:
            changed.pop().__class__ = nn.Linear

    return undo


@cache
def _mend_compiler() -> None:
    """Have torchao mend Inductor, which it does when asked to convert something, if only nothing.

    In PyTorch 2.14 a minimum, maximum or ReLU that is fused with a transposed FP8 store makes the store write garbage
    (triton-lang/triton#11111); torchao lets Inductor write them in another way, equal in every bit.
    """
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(nn.Module())


def _summary(names: Iterable[str]) -> str:
    """Names with their numbers left out where several differ in nothing else: ``blocks.*.attn.proj (12)``."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return ", ".join(f"{pattern} ({len(found)})" if len(found) > 1 else found[0] for pattern, found in patterns.items())
