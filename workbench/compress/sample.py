"""An input to trace a model with: :func:`one_sample`, the given one or a guess."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from workbench.errors import ConfigError, ModelError


def one_sample(model: nn.Module, example: Any) -> torch.Tensor:
    """One sample (1, ...) on the model's device: the given one, or one that the model accepts.

    Raises:
        ConfigError: the example isn't a batch of tensors.
        ModelError: there is none, and none can be guessed.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if example is not None:
        x = example[0] if isinstance(example, tuple | list) else example
        if not isinstance(x, torch.Tensor) or x.dim() < 2:
            raise ConfigError(
                f"The example is a {type(x).__name__}.", "Pass a tensor with a batch dimension, e.g. torch.zeros(1, 3, 224, 224)."
            )
        return x[:1].detach().to(device)
    for guess in _likely_inputs(model):
        x = guess.to(device)
        try:
            with torch.no_grad():
                model(x)
        except Exception:  # a guess that the model refuses; the next one is tried
            continue
        return x
    raise ModelError(
        f"No input for {type(model).__name__} could be guessed.", "Pass example=, one input with its batch dimension."
    )


def _likely_inputs(model: nn.Module) -> Iterator[torch.Tensor]:
    if published := getattr(model, "pretrained_cfg", None):
        yield torch.zeros(1, *published["input_size"])
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding)), None)
    if isinstance(first, nn.Embedding):
        yield from (torch.arange(1, length + 1)[None] % first.num_embeddings for length in (16, 8))
    elif isinstance(first, nn.Linear):
        yield torch.zeros(1, first.in_features)
    elif first is not None:
        sizes = (224, 32) if first.stride[0] > 1 else (32, 28, 64, 224)
        yield from (torch.zeros(1, first.in_channels, size, size) for size in sizes)
