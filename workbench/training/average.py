"""An exponential moving average of the weights (Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workbench.distributed import by_device, local


class WeightAverage:
    """The running average of a model's parameters and of its floating-point buffers.

    Buffers are averaged too, so that batch statistics fit the averaged weights; whole numbers stay the model's own. An update
    is a few fused operations outside of whatever is compiled or captured, and waits for nothing.

    Args:
        model: on its device; its tensors are changed in place only.
        decay: of the average, per optimizer step; 0 keeps none. At step t it is min(decay, (1 + t) / (10 + t)), so that the
            random weights of the beginning are soon forgotten.
        owns: whether a parameter or buffer is to be averaged, by name.
    """

    def __init__(self, model: nn.Module, decay: float, owns: Callable[[str], bool] = lambda name: True) -> None:
        self.decay = decay
        named = (*model.named_parameters(), *model.named_buffers())
        tensors: dict[str, Tensor] = {name: tensor for name, tensor in named if owns(name)}
        self._live = {name: tensor.detach() for name, tensor in tensors.items() if decay and tensor.is_floating_point()}
        self.state = {name: tensor.clone() for name, tensor in self._live.items()}
        """The average by name of parameter or buffer."""
        self.buffers = [self.state[name] for name, _ in model.named_buffers() if name in self.state]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step``, counted from 1."""
        if not self.state:
            return
        if step == 1:  # nothing to average yet: what a quantizer's observers begin with is infinite
            _copy(self.state, list(self._live.values()))
            return
        for average, live in by_device(_parts(self.state.values()), _parts(self._live.values())):
            torch._foreach_lerp_(average, live, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averaged weights within, its own again after; bit for bit."""
        own = [tensor.clone() for tensor in self._live.values()]
        self.apply()
        try:
            yield
        finally:
            _copy(self._live, own)

    def apply(self) -> None:
        """Give the model the averaged weights."""
        _copy(self._live, list(self.state.values()))

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from another's :attr:`state`."""
        _copy(self.state, [state[name] for name in self.state])


@torch.no_grad()
def _copy(target: dict[str, Tensor], source: list[Tensor]) -> None:
    for held, given in by_device(_parts(target.values()), _parts(source)):
        torch._foreach_copy_(held, given)


def _parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of them."""
    return [local(tensor) for tensor in tensors]
