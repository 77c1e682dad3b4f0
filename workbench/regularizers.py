"""Penalties on the weights, added to the loss while training: what makes channels or weights easy to remove afterwards.

A penalty is a function from a model to a scalar tensor with a gradient. ``TrainConfig.penalties`` names them with their
factors; they are computed in the type of the weights, whatever the precision of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from workbench.errors import ModelError
from workbench.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

PENALTIES = Registry(
    "penalty", {name: f"workbench.regularizers:{name}" for name in ("slimming", "l1", "group_lasso", "orthogonal")}
)
"""Functions from a model to a scalar tensor."""


def slimming(model: nn.Module) -> Tensor:
    """Sum of the absolute scales of batch normalizations: channels that are not needed fade (Liu et al. 2017, arXiv:1708.06519).

    Raises:
        ModelError: the model has no batch normalization with scales.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    scales = [module.weight for module in model.modules() if isinstance(module, _BatchNorm) and module.weight is not None]
    if not scales:
        raise ModelError(
            f"slimming shrinks the scales of batch normalizations, of which this {type(model).__name__} has none.",
            "Take group_lasso, which shrinks the channels' weights themselves.",
        )
    return _total([scale.abs().sum() for scale in scales])


def l1(model: nn.Module) -> Tensor:
    """Sum of the absolute weights of matrices and kernels; biases and normalizations are spared (Tibshirani 1996)."""
    return _total([weight.abs().sum() for weight in _weights(model)])


def group_lasso(model: nn.Module) -> Tensor:
    """Sum of the norms of all filters and all input channels of each layer (Wen et al. 2016, arXiv:1608.03665, section 3.1)."""
    return _total([_norms(weight) + _norms(weight.transpose(0, 1)) for weight in _weights(model)])


def orthogonal(model: nn.Module) -> Tensor:
    """Squared distance of the filters' Gram matrix from the identity, summed over layers (Bansal et al. 2018, arXiv:1810.09102).

    Of a layer with more filters than each has weights, the Gram matrix of its columns.
    """
    import torch

    parts = []
    for weight in _weights(model):
        matrix = weight.flatten(1)
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        identity = torch.eye(len(short), device=short.device, dtype=short.dtype)
        parts.append((short @ short.T - identity).square().sum())
    return _total(parts)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Trainable weights of two dimensions or more.

    Raises:
        ModelError: there are none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    if not found:
        raise ModelError(f"This {type(model).__name__} has no trainable matrix or kernel to penalize.", "Leave penalties empty.")
    yield from found


def _norms(weight: Tensor) -> Tensor:
    """Sum of the norms of the slices along the first dimension."""
    import torch

    total: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1).sum()
    return total


def _total(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.stack([part.to(parts[0].device) for part in parts]).sum()  # layers may lie on several devices
