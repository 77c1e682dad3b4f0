"""Quantized layers that read the same tensor, as one product with all their weights: :func:`join_siblings`.

A text model has separate layers for queries, keys and values; one large product keeps a GPU busier than three small ones.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.products import EightBitLinear, rounded


class Part(nn.Module):
    """Outputs ``start`` to ``stop`` of a layer that was joined of several.

    Each part computes the whole: it is for compilers that compute equal things once, as Inductor does with frozen weights.
    """

    def __init__(self, whole: EightBitLinear, start: int, stop: int) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.training = False

    @property
    def weight(self) -> Tensor:
        """[stop - start, in], as numbers."""
        return self.whole.weight[self.start : self.stop]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., stop - start]."""
        output: Tensor = self.whole(x)
        return output[..., self.start : self.stop]


def join_siblings(model: nn.Module, x: Tensor) -> list[list[str]]:
    """Join, in place, the layers of ``model`` that read the same tensor and round it alike.

    Args:
        x: an input of the model, which is called once.

    Returns:
        Names of the layers that became one, group by group.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, EightBitLinear)}
    if not layers:
        return []
    groups = [
        alike
        for readers in _readers(model, layers, x)
        for alike in _grouped((name, _rounding(layers[name])) for name in readers)
        if len(alike) > 1
    ]
    for names in groups:
        whole, start = _whole([layers[name] for name in names]), 0
        for name in names:
            model.set_submodule(name, Part(whole, start, start := start + layers[name].out_features))
    return groups


def _readers(model: nn.Module, layers: dict[str, EightBitLinear], x: Tensor) -> list[list[str]]:
    """Names of ``layers`` by the tensor that they read, those called just once."""
    seen: list[Tensor] = []  # kept, so that no later tensor takes an earlier one's identity
    readers: defaultdict[int, list[str]] = defaultdict(list)
    calls: Counter[str] = Counter()

    def watching(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            readers[id(inputs[0])].append(name)
            calls[name] += 1

        return see

    hooks = [layer.register_forward_pre_hook(watching(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [[name for name in names if calls[name] == 1] for names in readers.values()]


def _rounding(layer: EightBitLinear) -> Any:
    """What must be equal for layers to be joined."""
    if layer.input_scale is None:  # one scale for a whole input goes with one for a whole weight, which is each layer's own
        return (type(layer), layer.bias is None) if layer.by_channel else id(layer)
    zero = getattr(layer, "input_zero", None)
    return type(layer), layer.bias is None, layer.input_scale.item(), 0 if zero is None else zero.item()


def _grouped(keyed: Iterable[tuple[str, Any]]) -> list[list[str]]:
    groups: defaultdict[Any, list[str]] = defaultdict(list)
    for name, key in keyed:
        groups[key].append(name)
    return list(groups.values())


def _whole(layers: list[EightBitLinear]) -> EightBitLinear:
    whole = copy.deepcopy(layers[0])
    whole.out_features = sum(layer.out_features for layer in layers)
    if whole.kind.is_floating_point and not whole.by_channel:  # the kernel for one scale is the faster one
        whole.scale = torch.stack([layer.scale for layer in layers]).amax()
        whole.values = torch.cat([rounded(layer.values.float() * (layer.scale / whole.scale), layer.kind) for layer in layers])
    else:
        whole.by_channel = True
        whole.values = torch.cat([layer.values for layer in layers])
        whole.scale = torch.cat([layer.scale.expand(layer.out_features) for layer in layers])
    whole.bias = None if whole.bias is None else torch.cat([layer.bias for layer in layers if layer.bias is not None])
    return whole
