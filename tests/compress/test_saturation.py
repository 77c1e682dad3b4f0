"""What the workbench says of this CPU's INT8 products is what a product shows."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from workbench.compress import QuantConfig, quantize
from workbench.compress.saturation import saturates


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("bits", [8, 7])
def test_a_product_of_the_largest_numbers_saturates_where_it_is_said_to(bits: int) -> None:
    """All inputs at the top of ``bits`` unsigned bits, all weights 127: 64 products of 1 each."""
    top = 2**bits - 1
    weight = torch.quantize_per_tensor(torch.ones(1, 64), 1 / 127, 0, torch.qint8)
    x = torch.quantize_per_tensor(torch.ones(1, 64), 1 / top, 0, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    found = float(torch.ops.quantized.linear(x, packed, 0.5, 0).dequantize())
    assert (found < 60) == (bits == 8 and saturates())


@pytest.mark.parametrize("bits", [8, 7])
def test_quantizing_here_warns_of_it(bits: int, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    logging.getLogger("workbench").propagate = True
    with caplog.at_level("WARNING", logger="workbench"):
        quantize(model, QuantConfig(activation_bit=bits), torch.randn(16, 8))
    assert ("VNNI" in caplog.text) == (bits == 8 and saturates())
