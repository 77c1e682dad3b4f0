"""Pruning the hidden units of recurrent layers, which the dependency graph doesn't follow by itself.

A hidden unit owns one row in every gate of ``weight_ih`` and ``weight_hh``, one column of ``weight_hh``, one entry of each bias,
in each layer and direction, and one column in what reads the output. The layers of one ``nn.LSTM`` share their size, so a unit
goes from all of them at once; of a bidirectional one, unit *j* goes in both directions: output channels *j* and *H + j*.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_pruning
from torch import nn

RECURRENT = (nn.LSTM, nn.GRU)
_GATES = {nn.LSTM: 4, nn.GRU: 3}


def directions(layer: nn.Module) -> int:
    """1, or 2 of a bidirectional layer."""
    return 2 if getattr(layer, "bidirectional", False) else 1


class RecurrentPruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
    """Cuts hidden units (outputs) and input features of an LSTM or GRU."""

    def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.RNNBase:
        """Remove the hidden units of ``idxs``, output channels of which a unit's all are given."""
        hidden, gates = layer.hidden_size, _GATES[type(layer)]
        kept = torch.tensor(sorted(set(range(hidden)) - {index % hidden for index in idxs}))
        rows = torch.cat([kept + gate * hidden for gate in range(gates)])
        for name, parameter in list(layer.named_parameters(recurse=False)):
            index = rows.to(parameter.device)
            cut = parameter.data.index_select(0, index)
            if name.startswith("weight_hh"):
                cut = cut.index_select(1, kept.to(parameter.device))
            elif name.startswith("weight_ih") and not name.startswith("weight_ih_l0"):  # reads both directions below it
                both = torch.cat([kept + direction * hidden for direction in range(directions(layer))])
                cut = cut.index_select(1, both.to(parameter.device))
            _replace(layer, name, cut)
        layer.hidden_size = len(kept)
        return layer

    def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.RNNBase:
        """Remove the input features ``idxs``."""
        kept = torch.tensor(sorted(set(range(layer.input_size)) - set(idxs)))
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name.startswith("weight_ih_l0"):
                _replace(layer, name, parameter.data.index_select(1, kept.to(parameter.device)))
        layer.input_size = len(kept)
        return layer

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        return layer.hidden_size * directions(layer)

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        return layer.input_size

    def get_in_channel_groups(self, layer: nn.RNNBase) -> int:
        return 1

    def get_out_channel_groups(self, layer: nn.RNNBase) -> int:
        return directions(layer)


def _replace(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(layer, name, nn.Parameter(value.contiguous(), requires_grad=getattr(layer, name).requires_grad))
