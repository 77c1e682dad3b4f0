"""What a model is made of, beyond its weights: enough to build it again without pickle.

A model built or changed by the workbench carries a :class:`Structure` as the plain attribute ``model.structure``. It
survives ``copy.deepcopy`` and travels in the ``structure.json`` beside the weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Structure:
    """How to rebuild a model: a factory, then the changes made to what it returned, in order."""

    model: dict[str, Any] | None = None
    """The resolved ``ModelConfig`` as JSON values; None for a module that the workbench didn't build."""
    transforms: list[dict[str, Any]] = field(default_factory=list)
    """One record a change, oldest first; ``record["kind"]`` names who replays it."""

    def then(self, transform: dict[str, Any]) -> Structure:
        """This structure with one more change; the given one stays as it is."""
        return Structure(copy.deepcopy(self.model), [*copy.deepcopy(self.transforms), transform])


def check_module(model: Any) -> None:
    """Refuse what isn't a module, naming the one that it holds.

    Raises:
        ModelError: ``model`` is no ``torch.nn.Module``.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        held = isinstance(getattr(model, "model", None), nn.Module)
        raise ModelError(
            f"The model is a {type(model).__name__}.",
            "Pass the module that it holds: its .model." if held else "Pass a torch.nn.Module, e.g. load_model(path).",
        )


def structure_of(model: nn.Module) -> Structure:
    """The structure that ``model`` carries, or an empty one for a module from elsewhere."""
    found = getattr(model, "structure", None)
    return found if isinstance(found, Structure) else Structure()


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once; of a quantized model, those it had before they became integers."""
    for transform in reversed(structure_of(model).transforms):
        if "parameters" in transform:
            return int(transform["parameters"])
    return sum(parameter.numel() for parameter in model.parameters())


def is_channels_last(model: nn.Module) -> bool:
    """Whether the model's convolutions lie in memory channels last: another layout sums in another order."""
    import torch

    def is_so(tensor: torch.Tensor) -> bool:
        # By strides: a kernel of one input channel is contiguous either way, yet computes in the layout of its strides.
        plane = tensor.shape[2:].numel() if tensor.dim() == 4 else 1
        return plane > 1 and tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=torch.channels_last)

    return any(is_so(tensor) for tensor in model.state_dict().values())


def lay_out(model: nn.Module, device: torch.device) -> bool:
    """Put the model's convolutions channels last in memory, where they compute correctly so; whether they are.

    On CPUs with AVX2 and no AVX-512 some do not: oneDNN's kernel for the weights' gradient of a strided 1×1 convolution of fewer
    than eight channels is wrong there, and writes past its buffer (jit_1x1:avx2, seen with PyTorch 2.14.1).
    """
    import torch
    from torch import nn

    def wrong(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.in_channels // module.groups < 8
        )

    at_risk = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    last = not (at_risk and any(wrong(module) for module in model.modules()))
    model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    return last
