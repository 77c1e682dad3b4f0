"""N:M sparsity: of every M neighbouring weights N stay, as sparse tensor cores want them (2 of 4).

* :func:`sparsify` — a copy whose layers multiply their weights by a mask; it trains like any model, and the masks stay.
* :func:`bake_masks` — the same with ordinary layers, the masked weights set to zero: to export, quantize or convert.
* :func:`semi_structured` — on a GPU with sparse tensor cores, linear layers that run on them.

Masks are chosen once, by magnitude (Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, section 4);
train the sparse model on to recover.
"""

from __future__ import annotations

import copy
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.sparsity_config import SparsityConfig
from workbench.errors import DeviceError, ModelError, unknown
from workbench.models.structure import structure_of

_TILE = 64
"""Sparse tensor cores take rows and columns in multiples of this."""


class MaskedLinear(nn.Linear):
    """A linear layer of which masked weights count as zero, whatever an optimizer does to them."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.mask, self.bias)


class MaskedConv2d(nn.Conv2d):
    """A convolution of which masked weights count as zero, whatever an optimizer does to them."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.mask, self.bias)


_MASKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}


def sparsify(model: nn.Module, config: SparsityConfig | None = None) -> nn.Module:
    """A copy of ``model`` with the smallest weights of each group masked; the given model stays as it is.

    Returns:
        The sparse model; ``structure.transforms[-1]`` tells its ``layers`` and the share of their weights that is ``masked``.

    Raises:
        ModelError: no layer's inputs divide into groups, or the model has been quantized.
        ConfigError: an ignored layer that isn't there.
    """
    config = config or SparsityConfig()
    _refuse(model)
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.ignored:
        if not any(fnmatch(name, pattern) for name in names):
            raise unknown("layer", pattern, names)
    sparse = copy.deepcopy(model)
    layers = [
        name
        for name, layer in sparse.named_modules()
        if type(layer) in _MASKED
        and (config.convolutions or isinstance(layer, nn.Linear))
        and layer.weight.shape[1] % config.of == 0
        and not any(fnmatch(name, pattern) for pattern in config.ignored)
    ]
    if not layers:
        raise ModelError(
            f"No layer of {type(model).__name__} has inputs in groups of {config.of}.",
            "Choose another group size, or prune whole channels.",
        )
    kept = total = 0
    for name in layers:
        layer: Any = sparse.get_submodule(name)
        mask = nm_mask(layer.weight.detach(), config.keep, config.of)
        _mask(layer, mask)
        kept, total = kept + int(mask.sum()), total + mask.numel()
    record = {
        "kind": "sparsify",
        "config": config.model_dump(mode="json"),
        "layers": layers,
        "masked": 1 - kept / total,
    }
    sparse.structure = structure_of(model).then(record)  # type: ignore[assignment]
    return sparse


def nm_mask(weight: Tensor, keep: int = 2, of: int = 4) -> Tensor:
    """Which weights [out, in, ...] stay: of each ``of`` neighbours along the inputs, the ``keep`` largest in magnitude.

    Returns:
        bool, of the weight's shape. Of equal weights the first stay.
    """
    groups = weight.abs().movedim(1, -1)
    shape = groups.shape
    groups = groups.reshape(-1, of)
    first = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, first, True)
    return mask.reshape(shape).movedim(-1, 1).contiguous()


def bake_masks(model: nn.Module) -> nn.Module:
    """A copy with ordinary layers in place of masked ones, the masked weights zero: equal outputs, faster.

    Raises:
        ModelError: there is no masked layer.
    """
    names = _masked_layers(model)
    if not names:
        raise ModelError(f"No layer of {type(model).__name__} is masked.", "Call sparsify first.")
    baked = copy.deepcopy(model)
    for name in names:
        layer: Any = baked.get_submodule(name)
        layer.weight.data = layer.weight.data * layer.mask
        _unmask(layer)
    baked.structure = structure_of(model).then({"kind": "bake_masks", "layers": names})  # type: ignore[assignment]
    return baked


def semi_structured(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A copy for inference whose linear layers run on sparse tensor cores, where their weights are zero 2 of 4.

    Call it after loading: files hold the ordinary weights.

    Args:
        model: on a CUDA device, sparsified 2 of 4.
        dtype: of the whole copy, float16 or bfloat16.

    Raises:
        DeviceError: the model isn't on a GPU with sparse tensor cores (compute capability 8.0, Ampere, or later).
        ModelError: no linear layer has such weights in sizes that these take.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise DeviceError(
            f"Sparse tensor cores are on GPUs, and the model is on {device.type}.",
            "Move it: model.to('cuda'). On a CPU a sparse model isn't faster; prune whole channels for that.",
        )
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        raise DeviceError(f"{name} has no sparse tensor cores.", "Use one of 8.0 or later.")
    from torch.sparse import to_sparse_semi_structured

    fast = (bake_masks(model) if _masked_layers(model) else copy.deepcopy(model)).eval().to(dtype)
    converted = 0
    for layer in fast.modules():
        if type(layer) is nn.Linear and _fits(layer.weight):
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
            converted += 1
    if not converted:
        raise ModelError(
            f"No linear layer of {type(model).__name__} is sparse 2 of 4 with sizes in multiples of {_TILE}.",
            "Call sparsify first; layers of other sizes run dense.",
        )
    return fast


def replay(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Give a freshly built ``model`` the masked layers that ``record`` names; weights and masks are yet to be loaded."""
    for name in record["layers"]:
        layer: Any = model.get_submodule(name)
        _mask(layer, torch.ones_like(layer.weight, dtype=torch.bool))
    return model


def replay_bake(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Make the layers that ``record`` names ordinary again."""
    for name in record["layers"]:
        _unmask(model.get_submodule(name))
    return model


def _mask(layer: Any, mask: Tensor) -> None:
    layer.__class__ = _MASKED[type(layer)]  # the layer itself stays, with its hooks and what refers to it
    layer.register_buffer("mask", mask.contiguous(memory_format=_layout(layer.weight)))


def _unmask(layer: Any) -> None:
    layer.__class__ = next(plain for plain, masked in _MASKED.items() if type(layer) is masked)
    del layer.mask


def _layout(weight: Tensor) -> torch.memory_format:
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _masked_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, MaskedLinear | MaskedConv2d)]


def _fits(weight: Tensor) -> bool:
    rows, columns = weight.shape
    return rows % _TILE == 0 and columns % _TILE == 0 and bool((weight.reshape(-1, 4) != 0).sum(1).le(2).all())


def _refuse(model: nn.Module) -> None:
    for record in structure_of(model).transforms:
        if record["kind"] in ("quantize", "qat", "sparsify"):
            raise ModelError(f"This model was changed by {record['kind']!r}, which fixes its weights.", "Sparsify before that.")
