"""Losses by name. A loss takes the model's output and the target and returns the mean over the batch, a scalar tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from workbench.config import Arguments, Config, hint
from workbench.errors import ModelError
from workbench.registry import ImportPath, Registry

LOSSES = Registry(
    "loss",
    {
        "cross_entropy": "torch.nn:CrossEntropyLoss",
        "bce_with_logits": "torch.nn:BCEWithLogitsLoss",
        "nll": "torch.nn:NLLLoss",
        "mse": "torch.nn:MSELoss",
        "l1": "torch.nn:L1Loss",
        "smooth_l1": "torch.nn:SmoothL1Loss",
        "huber": "torch.nn:HuberLoss",
    },
)
"""Factories of losses: called with ``LossConfig.args``, they return the callable."""


class LossConfig(Config):
    """The loss that training minimizes."""

    name: ImportPath = Field(
        "cross_entropy", description="A registered loss or an import path.", json_schema_extra=hint(choices="losses")
    )
    args: Arguments = Field(
        {}, description="Keyword arguments, e.g. {label_smoothing: 0.1}.", json_schema_extra=hint(advanced=True)
    )

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        return LOSSES.check(name)


def make_loss(config: LossConfig) -> Callable[[Any, Any], Any]:
    """The loss as a callable (output, target) -> scalar tensor."""
    loss: Callable[[Any, Any], Any] = LOSSES.create(config.name, **config.args)
    return loss


def takes_labels(config: LossConfig, output: Any, target: Any) -> bool:
    """Whether targets are labels, which number the output's second dimension."""
    return config.name in ("cross_entropy", "nll") and getattr(output, "ndim", 0) >= 2 and not target.is_floating_point()


def check_labels(target: Any, classes: int, config: LossConfig) -> None:
    """Labels on the CPU against the number of classes: on an accelerator, one out of range ends the process without a word.

    Raises:
        ModelError: naming the label.
    """
    wrong = target[((target < 0) | (target >= classes)) & (target != config.args.get("ignore_index", -100))]
    if wrong.numel():
        raise ModelError(
            f"The model has {classes} outputs, but the data has the label {int(wrong[0])}.",
            "Set model.num_classes to the number of classes, or mend the label.",
        )


def check_output(loss: Callable[[Any, Any], Any], output: Any, target: Any, config: LossConfig) -> None:
    """Try the loss once, so that a model whose output does not fit is named before training starts.

    Args:
        output: of the model for one batch, on the CPU.
        target: of the same batch.

    Raises:
        ModelError: with both shapes, and what usually cures it.
    """
    import torch

    name = config.name

    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"The model returns {type(output).__name__}, but the loss {name!r} takes a tensor.", "Return the logits alone."
        )
    if takes_labels(config, output, target):
        check_labels(target, output.shape[1], config)
    try:
        with warnings.catch_warnings():
            # [B, 1] against [B] broadcasts to [B, B]: PyTorch warns, and trains something else.
            warnings.filterwarnings("error", message="Using a target size")
            value = loss(output, target)
    except Exception as error:
        raise ModelError(
            f"The model's output, {_describe(output)}, does not fit the loss {name!r} with targets {_describe(target)}: {error}",
            "Set model.num_classes, or take another loss.",
        ) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ModelError(f"The loss {name!r} gave {_describe(value)}, not one number.", "Reduce it to the mean over the batch.")


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{str(value.dtype).removeprefix('torch.')} {list(shape)}" if shape is not None else type(value).__name__
