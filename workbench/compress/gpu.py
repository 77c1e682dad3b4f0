"""Quantization for CUDA devices, by torchao: INT8 and FP8 products, weight-only INT8 and INT4. The rest computes in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.compilation import import_quietly
from workbench.compress.graph import layers_matching
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import DeviceError, ModelError

ALIGNED = 16
"""Sizes of a linear layer must be multiples of this for 8-bit tensor cores."""

GROUP = 128
"""Numbers of a row that share a scale in INT4."""


class ReducedModel(nn.Module):
    """A model whose linear layers are quantized and whose other parts are bf16; inputs and outputs are what they were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to(torch.bfloat16).requires_grad_(False)
        self.training = False

    def forward(self, x: Tensor) -> Any:
        output = self.model(x.to(torch.bfloat16) if x.is_floating_point() else x)
        return output.float() if isinstance(output, Tensor) else output


def on_gpu(source: nn.Module, config: QuantConfig, given: Any) -> tuple[nn.Module, dict[str, Any]]:
    """See :data:`~workbench.compress.quantization.METHODS`.

    Raises:
        DeviceError: there is no such GPU here, or it has no FP8.
        ModelError: no linear layer has a shape that its kernels take.
    """
    if not torch.cuda.is_available():
        raise DeviceError(
            "backend='cuda' quantizes on the GPU, and none is here.", "Use backend='cpu', or call this where the GPU is."
        )
    if config.mode == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has no FP8 arithmetic.",
            "Use mode='dynamic' (INT8), or compute capability 8.9 (Ada).",
        )
    ao = import_quietly("torchao.quantization")
    chosen = set(quantizable_layers(source, config))
    reduced = ReducedModel(source.cuda())
    ao.quantize_(reduced.model, _recipe(ao, config), filter_fn=lambda module, name: name in chosen)
    return reduced.requires_grad_(False), {}


def quantizable_layers(source: nn.Module, config: QuantConfig) -> list[str]:
    """Linear layers whose sizes 8-bit tensor cores take, without those to be kept.

    Raises:
        ModelError: there is none.
    """
    linear = {name: module for name, module in source.named_modules() if isinstance(module, nn.Linear)}
    kept = layers_matching(config.keep_float, linear)
    unit = GROUP if config.weight_bit == 4 else ALIGNED
    found = [
        name
        for name, module in linear.items()
        if name not in kept and module.in_features % unit == 0 and module.out_features % ALIGNED == 0
    ]
    if not found:
        raise ModelError(
            f"No linear layer of {type(source).__name__} can be quantized for the GPU: "
            f"inputs must be a multiple of {unit}, outputs of {ALIGNED}.",
            "Keep it in bf16; or quantize for the CPU, which has INT8 convolutions.",
        )
    return found


def _recipe(ao: Any, config: QuantConfig) -> Any:
    rows = config.granularity == "channel"
    # Of its own accord torchao would change the compiler's settings for the whole process.
    quiet = {"set_inductor_config": False}
    if config.mode == "fp8":
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow() if rows else ao.PerTensor(), **quiet)
    if config.mode == "dynamic":
        return ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerRow() if rows else ao.PerTensor(), **quiet)
    if config.weight_bit == 4:
        return ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", **quiet)
    return ao.Int8WeightOnlyConfig(granularity=ao.PerRow() if rows else ao.PerTensor(), **quiet)
