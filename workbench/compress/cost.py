"""What a model costs to run, counted: :func:`count_macs`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.compress.sample import evaluating


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of one pass over ``x``: convolutions, matrix products, attention, recurrent layers."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops})
    with evaluating(model), torch.no_grad(), counter:
        model(x)
    return int(counter.get_total_flops()) // 2


def _recurrent_flops(x: Any, weight_ih: Any, weight_hh: Any, *rest: Any, **others: Any) -> int:
    """Of one layer and direction: two products of matrices for each of the ``x[0] * x[1]`` inputs."""
    return 2 * math.prod(x[:2]) * (math.prod(weight_ih) + math.prod(weight_hh))
