"""An input to trace a model with.

* :func:`one_sample` — the given one, or a guess.
* :func:`try_out` — whether a model takes an input, in words; :func:`evaluating` — a model in evaluation mode for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workbench.errors import ConfigError, DataError, ModelError, WorkbenchError


def one_sample(model: nn.Module, example: Any) -> torch.Tensor:
    """One sample (1, ...) on the model's device: the given one, or one that the model accepts.

    Raises:
        ConfigError: the example isn't a batch of tensors.
        DataError: the model doesn't take it.
        ModelError: there is none, and none can be guessed.
    """
    first = next(model.parameters(), torch.zeros(()))
    if example is not None:
        x = example[0] if isinstance(example, tuple | list) and len(example) else example
        if not isinstance(x, torch.Tensor) or x.dim() < 2 or not len(x):
            found = f"tensor {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ConfigError(
                f"The example is a {found}.", "Pass a tensor with a batch dimension, e.g. torch.zeros(1, 3, 224, 224)."
            )
        x = x[:1].detach().to(first.device)
        try_out(model, x, "the example")
        return x
    for guess in _likely_inputs(model):
        x = guess.to(first.device, first.dtype if guess.is_floating_point() else guess.dtype)
        try:
            with evaluating(model), torch.no_grad():
                model(x)
        except Exception:  # a guess that the model refuses; the next one is tried
            continue
        return x
    raise ModelError(
        f"No input for {type(model).__name__} could be guessed.", "Pass example=, one input with its batch dimension."
    )


def try_out(model: nn.Module, x: torch.Tensor, what: str, name: str = "") -> None:
    """Call ``model`` on ``x`` once.

    Args:
        what: what ``x`` is, for the message.
        name: what the reader calls the model; by default, its class.

    Raises:
        DataError: the model doesn't take it.
    """
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    except WorkbenchError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise DataError(
            f"{name or type(model).__name__} doesn't take {what}, {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}: "
            f"{type(error).__name__}: {reason.rstrip('.')}.",
            "Pass one tensor (N, ...) of the shape and type that the model was made for; wrap a model of several inputs.",
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode while this is open; then every layer is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
