"""An LSTM with INT8 weights, for the CPU.

* :class:`Int8LSTM` — takes and gives what :class:`torch.nn.LSTM` does.
* ``torch.ops.workbench.int8_lstm`` — the kernel as one operation on plain tensors, so that a model with such a layer compiles as
  one graph and exports.

A process that loads an exported file must know the operation, which is ours; without it, PyTorch says no more than that it "ran
into an error when deserializing":

>>> import workbench.compress.int8_lstm
>>> model = torch.export.load("lstm.pt2").module()
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from workbench.compress.observers import weight_scale
from workbench.errors import ModelError


class Int8LSTM(nn.Module):
    """An LSTM with INT8 weights, one scale each, and inputs rounded at each call (FBGEMM's or oneDNN's kernels)."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        if lstm.proj_size:
            raise ModelError("There is no INT8 kernel for an LSTM with projections (proj_size).", "Keep it: keep_float=[…].")
        self.hidden_size, self.num_layers = lstm.hidden_size, lstm.num_layers
        self.batch_first, self.bidirectional = lstm.batch_first, lstm.bidirectional
        self.training = False
        self._names = [name for names in lstm._all_weights for name in names if name.startswith("weight")]
        for name, parameter in lstm.named_parameters():
            if name.startswith("bias"):
                self.register_buffer(name, parameter.detach().clone())
                continue
            scale = weight_scale(parameter.detach(), per_channel=False)[:1].clone()
            self.register_buffer(name, torch.round(parameter.detach() / scale).clamp(-127, 127).to(torch.int8))
            self.register_buffer(f"{name}_scale", scale)
        self._biases = [name.replace("weight", "bias") for name in self._names] if lstm.bias else []

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[N, L, F] (or [L, N, F]) -> outputs, (hidden, cell)."""
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise ModelError("An INT8 LSTM takes no packed sequence.", "Pad the batch and mask the outputs, or keep it in float.")
        if state is None:
            batch = x.shape[0 if self.batch_first else 1]
            zeros = x.new_zeros(self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
            state = (zeros, zeros)
        weights, scales, biases = (
            [self.get_buffer(name) for name in names]
            for names in (self._names, [f"{name}_scale" for name in self._names], self._biases)
        )
        output, hidden, cell = torch.ops.workbench.int8_lstm(
            x, *state, weights, scales, biases, self.bidirectional, self.batch_first
        )
        return output, (hidden, cell)

    def flatten_parameters(self) -> None:
        """As of :class:`torch.nn.LSTM`; there is nothing to do."""


@torch.library.custom_op("workbench::int8_lstm", mutates_args=(), device_types="cpu")
def _int8_lstm(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, hidden and cell states.

    Args:
        weights: int8; of the inputs [4 H, F] and of the states [4 H, H], for each layer and direction in turn.
        scales: [1] each, of the weights.
        biases: [4 H] each, as the weights; or none.
    """
    layers = len(weights) // (4 if bidirectional else 2)
    output, states, cells = torch.ops.aten.quantized_lstm.input(
        x,
        [hidden, cell],
        _packed(weights, scales, biases),
        bool(biases),
        layers,
        0.0,
        False,
        bidirectional,
        batch_first,
        dtype=torch.qint8,
        use_dynamic=True,
    )
    return output.contiguous(), states.contiguous(), cells.contiguous()  # laid out as those who compile are told


@_int8_lstm.register_fake
def _shapes(x: Tensor, hidden: Tensor, cell: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, bidirectional, _ = others
    width = hidden.shape[-1] * (1 + bidirectional)
    return x.new_empty((*x.shape[:-1], width)), torch.empty_like(hidden), torch.empty_like(cell)


_PACKED: Any = WeakIdKeyDictionary()
"""By the first weight, while it lives: the weights' versions, and all of them as the kernels take them."""


def _packed(weights: list[Tensor], scales: list[Tensor], biases: list[Tensor]) -> list[Any]:
    versions = [0 if weight.is_inference() else weight._version for weight in weights]
    known, cells = _PACKED.get(weights[0], (None, []))
    if known != versions:
        cells = [
            _cell(weights[i : i + 2], scales[i : i + 2], biases[i : i + 2] or [None, None]) for i in range(0, len(weights), 2)
        ]
        _PACKED[weights[0]] = versions, cells
    return list(cells)


def _cell(weights: list[Tensor], scales: list[Tensor], biases: list[Tensor] | list[None]) -> Any:
    """Both products of one layer and direction, packed for the kernel."""
    packed = []
    for weight, scale, bias in zip(weights, scales, biases, strict=True):
        with warnings.catch_warnings():  # the kernels take no other form of a weight than the one that is to go
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            integers = torch._make_per_tensor_quantized_tensor(weight, scale.item(), 0)
        packed.append(torch.ops.quantized.linear_prepack(integers, bias))
    return torch.ops.quantized.make_quantized_cell_params_dynamic(*packed, *biases, False)
