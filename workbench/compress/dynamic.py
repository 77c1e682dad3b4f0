"""Quantization without calibration, for the CPU: 8-bit weights, and activations measured at each call or left alone.

* :func:`dynamic` — linear layers by torchao, LSTMs and embeddings by the modules here.
* :class:`Int8Embedding` — rows of integers, each with its scale.
* :mod:`~workbench.compress.int8_lstm` — an LSTM whose products are INT8.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.compress.compilation import import_quietly
from workbench.compress.graph import layers_matching
from workbench.compress.int8_lstm import Int8LSTM
from workbench.compress.observers import weight_scale
from workbench.compress.quantization_config import QuantConfig
from workbench.errors import ModelError

_LITTLE = 0.1
"""Of the parameters: if fewer become integers, quantizing hardly changes a model."""


def dynamic(source: nn.Module, config: QuantConfig, given: Any) -> tuple[nn.Module, dict[str, Any]]:
    """See :data:`~workbench.compress.quantization.METHODS`; nothing depends on samples, so that it rebuilds as it builds."""
    ao = import_quietly("torchao.quantization")
    weight_only = config.mode == "weight_only"
    root = nn.Module()  # a model may be a single layer
    root.model = source
    kinds: tuple[type[nn.Module], ...] = (
        (nn.Linear, nn.LSTM) if config.embedding_bit == 32 else (nn.Linear, nn.LSTM, nn.Embedding)
    )
    modules = {name: module for name, module in root.named_modules() if isinstance(module, kinds)}
    kept = {f"model.{name}" for name in layers_matching(config.keep_float, [name.removeprefix("model.") for name in modules])}
    chosen = {name: module for name, module in modules.items() if name not in kept and _callable(module)}
    if not any(isinstance(module, nn.Linear | nn.LSTM) for module in chosen.values()):
        raise ModelError(f"{type(source).__name__} has no linear layer or LSTM for mode={config.mode!r}.", "Use mode='static'.")
    if not isinstance(given, dict):  # it is said once, not at each loading
        _say_if_little(source, config)
    for name, module in chosen.items():
        if isinstance(module, nn.Embedding):
            _put(root, name, Int8Embedding(module))
        elif isinstance(module, nn.LSTM):
            if weight_only:
                raise ModelError(
                    f"mode='weight_only' has no form of the LSTM {name.removeprefix('model.')!r}.",
                    "Use mode='dynamic', or name the LSTM in keep_float.",
                )
            _put(root, name, Int8LSTM(module))
    granularity = ao.PerRow() if config.by_channel else ao.PerTensor()
    if weight_only:
        recipe = ao.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    else:
        recipe = ao.Int8DynamicActivationInt8WeightConfig(granularity=granularity, set_inductor_config=False)
    linear = {name for name, module in chosen.items() if isinstance(module, nn.Linear)}
    if linear:
        ao.quantize_(root, recipe, filter_fn=lambda module, name: name in linear)
    model: nn.Module = root.model
    return model.requires_grad_(False), {}


class Int8Embedding(nn.Module):
    """An embedding [rows, width] as integers with one scale a row; each lookup reads a quarter of the bytes."""

    values: Tensor
    scale: Tensor

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        if embedding.max_norm is not None:
            raise ModelError("An embedding with max_norm changes when it is read.", "Set embedding_bit=32.")
        weight = embedding.weight.detach()
        scale = weight_scale(weight, per_channel=True)
        self.register_buffer("values", torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        return F.embedding(ids, self.values) * F.embedding(ids, self.scale[:, None])

    @property
    def weight(self) -> Tensor:
        """The rows as numbers [rows, width], for models that read them elsewhere too."""
        return self.values * self.scale[:, None]


def _say_if_little(source: nn.Module, config: QuantConfig) -> None:
    """Warn where most of a model has no form here, whatever the settings keep."""
    kinds = (nn.Linear, nn.LSTM, nn.Embedding)
    taken = {p for module in source.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)}
    share = sum(p.numel() for p in taken) / sum(p.numel() for p in source.parameters())
    if share < _LITTLE:
        warnings.warn(
            f"mode={config.mode!r} takes linear layers, LSTMs and embeddings: {share:.1%} of the parameters of "
            f"{type(source).__name__}. For convolutions, use mode='static'.",
            stacklevel=4,
        )


def _callable(module: nn.Module) -> bool:
    """Whether a layer is called: attention of :class:`torch.nn.MultiheadAttention` reads its projection's weight instead."""
    return type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(root.get_submodule(owner), last, module)
