"""Equalized channels: the same function, closer when rounded; only where it gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench.artefact import load_model, save_model
from workbench.compress import QuantConfig, compiled, quantize
from workbench.compress.compilation import has_compiler
from workbench.compress.equalization import equalize
from workbench.compress.graph import export_graph
from workbench.compress.saturation import saturates
from workbench.models import ModelConfig, build_model

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

NETS = Path(__file__).with_name("nets.py")


def build(spread: float) -> nn.Module:
    """A separable network whose channels differ ``spread``-fold before its depthwise convolution."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"{NETS}:separable", num_classes=10, args={"spread": spread}))
    with torch.no_grad():
        model.train()
        for _ in range(100):  # statistics as after training
            model(torch.randn(64, 3, 16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(1000.0)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def off(model: nn.Module, int8: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return ((int8(x) - model(x)).norm() / model(x).norm()).item()


def test_the_function_stays_and_channels_have_one_range(model: nn.Module, x: Tensor) -> None:
    source = build(1000.0)  # shares its weights with the graph
    graph = export_graph(source, x)
    assert equalize(graph, [x[:32], x[32:]]) == ["depthwise"]
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
        value = model.norm(model.stem(x))
        value = torch.nn.functional.hardswish(value) * model.gain * graph.depthwise.input_factors
    ranges = value.amax((0, 2, 3)).clamp(min=0) - value.amin((0, 2, 3)).clamp(max=0)
    torch.testing.assert_close(ranges, ranges[:1].expand(8), rtol=1e-4, atol=0)


@pytest.mark.skipif(saturates(), reason="INT8 products saturate on this CPU, which has no VNNI")
def test_int8_comes_closer_and_reloads(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    plain = quantize(model, QuantConfig(equalize=False, correct_bias=False), x)
    equalized = quantize(model, QuantConfig(correct_bias=False), x)
    assert off(model, equalized, x) < 0.03 and off(model, equalized, x) < off(model, plain, x) / 5
    assert equalized.structure.transforms[-1]["equalized"] == ["depthwise"]
    save_model(equalized, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), equalized(x))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build(1000.0).parameters(), strict=True))
    if has_compiler():
        assert off(equalized, compiled(equalized), x) < 0.01


def test_nothing_is_inserted_where_little_is_gained_or_the_layer_stays_float(model: nn.Module, x: Tensor) -> None:
    alike = build(1.0)
    assert quantize(alike, QuantConfig(), x).structure.transforms[-1]["equalized"] == []
    kept = quantize(model, QuantConfig(keep_float=["depth*"]), x)
    assert kept.structure.transforms[-1]["equalized"] == []
    single = nn.Conv2d(3, 3, 3, groups=3).eval()  # its weight has no module to keep the factors
    assert off(single, quantize(single, QuantConfig(), x), x) < 0.05
