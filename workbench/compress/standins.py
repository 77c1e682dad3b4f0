"""Stand-ins for layers that the dependency graph misreads: the same shapes and couplings, in operations that it follows.

:func:`traceable` puts them in place while a model is traced; nothing is ever computed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from workbench.compress.recurrent import directions


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """While open, layers of ``model`` with a stand-in run that."""
    replaced = []
    for layer in model.modules():
        stand_in = STAND_INS.get(type(layer).__name__)
        if stand_in is not None and "forward" not in vars(layer):
            layer.forward = stand_in(layer)
            replaced.append(layer)
    try:
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _recurrent(layer: Any) -> Callable[..., Any]:
    """One operation in place of a loop over time."""

    def forward(x: Tensor | PackedSequence, state: Any = None) -> tuple[Any, Any]:
        data = x.data if isinstance(x, PackedSequence) else x
        batch = 1 if data.dim() < 3 else data.shape[0 if layer.batch_first else 1]
        states = (layer.num_layers * directions(layer), batch, layer.hidden_size)
        output, hidden, cell = _Zeros.apply(data, layer.weight_ih_l0, layer.hidden_size * directions(layer), states)
        whole = x._replace(data=output) if isinstance(x, PackedSequence) else output
        return whole, (hidden, cell) if isinstance(layer, nn.LSTM) else hidden

    return forward


class _Zeros(torch.autograd.Function):
    """Zeros of a recurrent layer's output shapes, that depend on its input and, where that is the model's, on its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, width: int, states: tuple[int, ...]) -> tuple[Tensor, ...]:
        return x.new_zeros(*x.shape[:-1], width), x.new_zeros(states), x.new_zeros(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("the graph is only read")


def _patch_merging(layer: Any) -> Callable[[Tensor], Tensor]:
    """Swin's: the channels of 2×2 patches one after the other, as a concatenation in place of a reshape.

    The order within a patch is that of timm's, by columns; for the couplings any would do.
    """

    def forward(x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        rows, columns = (torch.arange(0, size, 2, device=x.device) for size in padded.shape[1:3])
        parts = [padded.index_select(1, rows + row).index_select(2, columns + column) for column in (0, 1) for row in (0, 1)]
        merged: Tensor = layer.reduction(layer.norm(torch.cat(parts, -1)))
        return merged

    return forward


STAND_INS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "PatchMerging": _patch_merging,
}
"""By the name of the layer's class: a function from the layer to its stand-in's forward."""
