"""Corrected biases: layers' means are those of the float model, by hand for one layer and at the end of a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench.artefact import load_model, save_model
from workbench.compress import QuantConfig, correction, quantize
from workbench.compress.observers import quantized, scale_and_zero_point
from workbench.models import ModelConfig, build_model

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

NETS = Path(__file__).with_name("nets.py")
PLAIN = QuantConfig(correct_bias=False, observer="minmax")
CORRECTED = QuantConfig(observer="minmax")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=f"{NETS}:residual", num_classes=10, in_channels=1)).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def off(model: nn.Module, int8: nn.Module, x: Tensor) -> float:
    """How far the mean outputs are apart."""
    with torch.no_grad():
        return (int8(x).double().mean(0) - model(x).double().mean(0)).norm().item()


def test_one_layers_bias_moves_by_the_mean_of_its_error() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 4)), torch.randn(100, 16) + 1
    int8 = quantize(model, CORRECTED, x)
    (scale, zero), state = next(iter(int8.structure.transforms[-1]["activations"].values())), int8.state_dict()
    assert (scale, zero) == pytest.approx([v.item() for v in scale_and_zero_point(x.min(), x.max(), CORRECTED)])
    weight = state["graph.0.weight"].double() * state["graph.0.weight_scale"].double()[:, None]
    rounded = quantized(x, x.min(), x.max(), CORRECTED).double()
    layer = model[0].double()
    expected = layer.bias + (x.double() @ layer.weight.T - rounded @ weight.T).mean(0)
    bias = next(value for name, value in state.items() if name.endswith("bias"))
    assert (layer.bias - expected).abs().max() > 1e-4
    torch.testing.assert_close(bias.double(), expected, rtol=0, atol=2e-6)


def test_a_networks_mean_output_is_that_of_the_float_model(net: nn.Module, x: Tensor) -> None:
    assert off(net, quantize(net, CORRECTED, x), x) < 0.05 * off(net, quantize(net, PLAIN, x), x)


def test_only_as_many_samples_are_used_as_fit(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "LARGEST", 8 * 28 * 28)
    int8 = quantize(net, CORRECTED, x)
    assert off(net, int8, x[:8]) < 0.2 * off(net, int8, x)


def test_reloads_with_its_biases(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    int8 = quantize(net, CORRECTED, x)
    save_model(int8, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), int8(x))


class Shared(nn.Module):
    """One layer used twice, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.bare = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_a_bias_that_two_layers_share_stays() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(32, 8)
    plain, corrected = (quantize(model, config, x).state_dict() for config in (PLAIN, CORRECTED))
    assert all(torch.equal(corrected[name], value) for name, value in plain.items())
