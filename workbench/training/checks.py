"""What is refused before anything is compiled or trained: meshes for what they can't divide, models for the data."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from workbench.data.batches import Batches
from workbench.data.mix import mix_targets
from workbench.data.splits import Arrays, Splits
from workbench.errors import ConfigError, ModelError
from workbench.losses import check_labels, check_output, make_loss, takes_labels
from workbench.training.config import TrainConfig
from workbench.training.mesh import Mesh
from workbench.training.precision import Precision


def check_mesh(config: TrainConfig, mesh: Mesh, precision: Precision) -> None:
    """Refuse what a divided model can't do.

    Raises:
        ConfigError: that.
    """
    if not mesh.plain and precision.name == "fp16":
        raise ConfigError(
            "precision='fp16' scales the loss, and ranks that hold parts of a model do not agree on when it overflowed.",
            "Take precision='bf16' or 'fp32', or replicate the model: mesh.shard=1, mesh.tensor=1.",
        )
    if precision.name == "fp8" and mesh["tensor"] > 1:
        raise ConfigError(
            f"precision='fp8' scales tensors by their largest number, and mesh.tensor={mesh['tensor']} leaves no rank a whole.",
            f"Take mesh.shard={mesh['tensor']}, or precision='bf16'.",
        )
    for name in ("tensor", "pipeline"):
        for part in ("penalties", "distill"):
            if mesh[name] > 1 and getattr(config, part):
                raise ConfigError(
                    f"{part} looks at layers as a whole, and mesh.{name}={mesh[name]} divides them.",
                    f"Take mesh.shard={mesh[name]} instead.",
                )


@torch.no_grad()
def check_model(model: nn.Module, batches: Batches, config: TrainConfig, precision: Precision) -> None:
    """One small batch through model and loss; targets are checked from then on.

    Raises:
        ConfigError, DataError: the loss does not take this output, or these targets.
        ModelError: the model does not take this input.
    """
    _check_ids(model, batches.splits)
    x, y, count = next(batches.evaluation())
    x, y = (part[: min(2, count)] if isinstance(part, torch.Tensor) else part for part in (x, y))
    model.eval()
    try:
        with precision.autocast():
            output = model(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ModelError(
            f"The model {config.model.name!r} fails on an input of shape {shape}: {error}",
            "Set mesh.devices so that layers whose outputs are added or joined lie on one device."
            if config.mesh.devices and "same device" in str(error)
            else "Set model.in_channels or model.args to fit the data.",
        ) from error
    finally:
        model.train()
    loss, output, y = make_loss(config.loss), output.float().cpu() if isinstance(output, torch.Tensor) else output, y.cpu()
    check_output(loss, output, y, config.loss)
    if takes_labels(config.loss, output, y):
        batches.watch(partial(check_labels, classes=output.shape[1], config=config.loss), output.shape[1])
        if config.data.mix != "off":  # a loss of labels need not take probabilities
            check_output(loss, output, mix_targets(y, y, torch.ones(len(y)), output.shape[1]), config.loss)


def _check_ids(model: nn.Module, splits: Splits) -> None:
    """Token ids against the model's embedding: on an accelerator, one out of range ends the process without a word."""
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    for part in (splits.train, splits.eval):
        if embedding is None or not isinstance(part, Arrays) or part.x.dtype != torch.int64:
            return
        if (largest := int(part.x.max())) >= embedding.num_embeddings:
            raise ModelError(
                f"The data has the token id {largest}, but the model's embedding holds {embedding.num_embeddings}.",
                f"Set model.args.vocab_size={largest + 1}.",
            )
