"""Who holds a rank's memory, counted from storages: each once, as much of it as this rank's device has.

* :class:`RunParts` — what a trainer tells probes of itself;
* :class:`Census` — a count in progress;
* :class:`ByLayer` — bytes by layer of one holder each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.allocator import storages

HOLDERS = ("parameters", "gradients", "optimizer", "buffers", "average", "exchange", "teacher", "data")
"""Who can be told apart, besides activations and what remains: weights, their gradients, the optimizer's state, the model's
buffers, the average of weights (``ema``), what gradients travel in, a teacher's tensors, samples that wait on the device."""


@dataclass(frozen=True)
class RunParts:
    """What a trainer is made of, for probes that look beyond the model.

    Attributes:
        trained: what the optimizer updates, wrapped as it computes.
        optimizer: its state is made by the first update.
        named: of the later :data:`HOLDERS`, those there are, asked at each reading.
        buckets: bytes that gradients travel in.
        views: whether gradients are views of these buckets, which then are their memory, whether or not there are any.
        compiled: whether layers are compiled, so that no hook on them sees what they allocate.
        flying: micro-batches whose activations are there at once.
    """

    trained: nn.Module
    optimizer: torch.optim.Optimizer
    named: Mapping[str, Callable[[], Iterable[Tensor]]] = field(default_factory=dict)
    buckets: int = 0
    views: bool = False
    compiled: bool = False
    flying: int = 1


ByLayer = dict[str, int]


class Census:
    """Bytes of tensors on one device; a storage counts for who is asked first.

    Host memory only is read: the device is asked nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[int] = set()

    def count(self, tensor: Tensor) -> int:
        """Bytes of the storages behind ``tensor`` that were not counted before."""
        found = 0
        for storage in storages(tensor):
            address = storage.data_ptr()
            if storage.device == self._device and address not in self._seen:
                self._seen.add(address)
                found += storage.nbytes()
        return found

    def layers(self, tensors: Iterable[tuple[str, Tensor]]) -> ByLayer:
        """Bytes by layer of tensors with the names of parameters: ``layer1.0.conv1.weight`` belongs to ``layer1.0.conv1``."""
        found: ByLayer = {}
        for name, tensor in tensors:
            layer = name.rpartition(".")[0]
            found[layer] = found.get(layer, 0) + self.count(tensor)
        return found


def take_census(model: nn.Module, device: torch.device, parts: RunParts | None) -> tuple[dict[str, int], dict[str, ByLayer]]:
    """Bytes by holder, and by layer those of parameters, gradients and optimizer state.

    Exact: sums of storages on ``device``, without what the allocator adds to each to round it up (to 512 bytes on CUDA).
    """
    trained = parts.trained if parts is not None else model
    census, by_layer = Census(device), {}
    prefix = "" if trained is model else "model."  # beside what the terms of distillation learn
    named = [(name.removeprefix(prefix), parameter) for name, parameter in trained.named_parameters()]
    by_layer["parameters"] = census.layers(named)
    buffers = sum(census.count(buffer) for buffer in trained.buffers())
    gradients = [(name, parameter.grad) for name, parameter in named]
    by_layer["gradients"] = census.layers((name, gradient) for name, gradient in gradients if gradient is not None)
    state = parts.optimizer.state if parts is not None else {}
    held = ((name, value) for name, p in named if p in state for value in state[p].values() if isinstance(value, Tensor))
    by_layer["optimizer"] = census.layers(held)
    found = {holder: sum(layers.values()) for holder, layers in by_layer.items()}
    found["buffers"] = buffers
    for holder, tensors in (parts.named if parts is not None else {}).items():
        found[holder] = sum(census.count(tensor) for tensor in tensors())
    if parts is not None and not parts.views:
        found["exchange"] = found.get("exchange", 0) + parts.buckets
    return {holder: found.get(holder, 0) for holder in HOLDERS}, by_layer


def gradient_bytes(trained: nn.Module, device: torch.device) -> int:
    """Bytes of the gradients there are now."""
    census = Census(device)
    return sum(census.count(p.grad) for p in trained.parameters() if p.grad is not None)
