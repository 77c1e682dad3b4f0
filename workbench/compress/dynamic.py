"""Quantization without calibration, for the CPU: 8-bit weights, and activations measured at each call or left alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from workbench.compress.compilation import import_quietly
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ModelError


def dynamic(source: nn.Module, config: QuantConfig, given: Any) -> tuple[nn.Module, dict[str, Any]]:
    """INT8 linear layers; see :data:`~workbench.compress.quantization.METHODS`."""
    import_quietly("torchao.quantization")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if not any(isinstance(module, nn.Linear) for module in source.modules()):
        raise ModelError("Dynamic quantization is for linear layers, and this model has none.", "Use mode='static'.")
    quantize_(source, Int8DynamicActivationInt8WeightConfig())
    return source.requires_grad_(False), {}
