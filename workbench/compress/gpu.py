"""Quantization for CUDA devices: INT8 and FP8 products by modules of our own, weight-only INT8 and INT4 by torchao.

The rest of a model computes in bf16. The modules run on a CPU too, where they show what the GPU will compute, slowly.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.compress.calibration import inputs_seen
from workbench.compress.compilation import import_quietly
from workbench.compress.graph import layers_matching
from workbench.compress.observers import SMALLEST, Seen, minmax, scale_and_zero_point
from workbench.compress.patches import patches_as_products
from workbench.compress.products import LARGEST, Fp8Linear, Int8Linear, Range
from workbench.compress.quantization_config import OBSERVERS, QuantConfig
from workbench.errors import ArtefactError, DeviceError, ModelError

ALIGNED = 16
"""Sizes of a linear layer must be multiples of this for 8-bit tensor cores."""

GROUP = 128
"""Numbers of a row that share a scale in INT4."""


class ReducedModel(nn.Module):
    """A model in bf16, which it takes over; what goes in and comes out is of the types that it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = patches_as_products(model).to(torch.bfloat16).requires_grad_(False)
        self.training = False

    def forward(self, x: Tensor) -> Any:
        output = self.model(x.to(torch.bfloat16) if x.is_floating_point() else x)
        return output.float() if isinstance(output, Tensor) else output


def on_gpu(source: nn.Module, config: QuantConfig, given: Any) -> tuple[nn.Module, dict[str, Any]]:
    """See :data:`~workbench.compress.quantization.METHODS`. What was quantized before is rebuilt without a GPU, too.

    Raises:
        DeviceError: there is no such GPU here, or it has no FP8.
        ModelError: no linear layer has a shape that its kernels take.
    """
    rebuilding = isinstance(given, dict) and config.mode != "weight_only"
    if not torch.cuda.is_available() and not rebuilding:
        raise DeviceError(
            "backend='cuda' quantizes on the GPU, and none is here.", "Use backend='cpu', or call this where the GPU is."
        )
    if config.mode == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has no FP8 arithmetic.",
            "Use mode='static' or 'dynamic' (INT8), or compute capability 8.9 (Ada).",
        )
    if config.mode == "weight_only":
        return _weights_only(source.cuda(), config), {}
    return reduced(source if rebuilding else source.cuda(), config, given)


def reduced(source: nn.Module, config: QuantConfig, given: list[Tensor] | dict[str, Any]) -> tuple[ReducedModel, dict[str, Any]]:
    """``source`` with 8-bit products, on the device where it is; see :data:`~workbench.compress.quantization.METHODS`.

    Raises:
        ModelError: no linear layer has a shape that the kernels take, or the samples reach none.
        ArtefactError: the record is of an older kind.
    """
    names = quantizable_layers(source, config)
    inputs: dict[str, Range | None]
    if isinstance(given, dict):  # the numbers themselves come with the weights
        if "layers" not in given:
            raise ArtefactError("This model was quantized for GPUs by an older workbench.", "Quantize it again.")
        inputs = {name: Range(1.0) if given["calibrated"] else None for name in given["layers"]}
    elif given:
        seen = inputs_seen(source, names, given)
        if not seen:
            raise ModelError(
                f"The samples reach no linear layer of {type(source).__name__} that could be quantized.",
                "Use mode='dynamic', or pass samples that the model takes in use.",
            )
        inputs = {name: _range(seen[name], config) for name in names if name in seen}
    else:
        inputs = dict.fromkeys(names)
    kind = Fp8Linear if config.mode == "fp8" else Int8Linear
    by_channel = config.by_channel
    # Made from the fp32 weights; the model is rounded to bf16 afterwards.
    made = {name: kind(cast(nn.Linear, source.get_submodule(name)), by_channel, of) for name, of in inputs.items()}
    model = ReducedModel(source)
    for name, module in made.items():
        model.set_submodule(f"model.{name}" if name else "model", module)
    return model, {"layers": list(made), "calibrated": None not in inputs.values()}


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


def _range(seen: Seen, config: QuantConfig) -> Range:
    if config.mode == "fp8":
        # Floating-point levels lie as dense in a wide range as in a narrow one: nothing is gained by clipping.
        low, high = minmax(seen, config) if config.observer == "auto" else OBSERVERS.factory(config.observer)(seen, config)
        return Range(max(-low, high, LARGEST[torch.float8_e4m3fn] * SMALLEST) / LARGEST[torch.float8_e4m3fn])
    low, high = OBSERVERS.factory(config.observer)(seen, config)
    scale, zero = scale_and_zero_point(torch.tensor(low), torch.tensor(high), config)
    return Range(float(scale), int(zero) - 128)


def _weights_only(source: nn.Module, config: QuantConfig) -> ReducedModel:
    """By torchao."""
    ao = import_quietly("torchao.quantization")
    chosen = set(quantizable_layers(source, config))
    model = ReducedModel(source)
    # Of its own accord torchao would change the compiler's settings for the whole process.
    quiet = {"set_inductor_config": False}
    if config.weight_bit == 4:
        recipe = ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", **quiet)
    else:
        granularity = ao.PerRow() if config.by_channel else ao.PerTensor()
        recipe = ao.Int8WeightOnlyConfig(granularity=granularity, **quiet)
    ao.quantize_(model.model, recipe, filter_fn=lambda module, name: name in chosen)
    return model.requires_grad_(False)
