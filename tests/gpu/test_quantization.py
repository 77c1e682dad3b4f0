"""8-bit products on a GPU: near the float model, the same compiled and reloaded, whatever the number of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench import QuantConfig, load_model, quantize, save_model
from workbench.compress import compiled
from workbench.compress.products import EightBitLinear, Fp8Linear, Int8Linear, Range
from workbench.models import ModelConfig, build_model

CONFIGS = {
    "fp8": QuantConfig(mode="fp8", backend="cuda"),
    "fp8 channel": QuantConfig(mode="fp8", backend="cuda", granularity="channel"),
    "int8": QuantConfig(mode="static", backend="cuda"),
    "int8 dynamic": QuantConfig(mode="dynamic", backend="cuda"),
}


def need(name: str) -> None:
    if name.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs FP8 tensor cores")


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_a_layer_computes_what_it_does_on_the_cpu(
    kind: type[EightBitLinear], by_channel: bool, calibrated: bool, rows: int
) -> None:
    need("fp8" if kind is Fp8Linear else "int8")
    torch.manual_seed(0)
    layer = kind(nn.Linear(64, 48), by_channel, Range(0.02, -3 if kind is Int8Linear else 0) if calibrated else None)
    x = torch.randn(rows, 64)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", ["bert_small", "vit_tiny_patch16_224"])
def test_a_model_stays_close_compiled_and_reloaded(case: str, name: str, tmp_path: Path) -> None:
    need(name)
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=case, num_classes=10)).eval()
    x: Tensor = torch.randint(1, 8000, (16, 64)) if case == "bert_small" else torch.randn(16, 3, 224, 224)
    with torch.no_grad():
        reference = model(x)
        quantized = quantize(model, CONFIGS[name], x)
        output = quantized(x.cuda()).cpu()
        error = (output - reference).norm() / reference.norm()
        assert error < (0.25 if name.startswith("fp8") else 0.1), error
        fast = compiled(quantized)
        assert (fast(x.cuda()).cpu() - output).norm() / output.norm() < 0.15
        assert fast(x[:1].cuda()).shape == (1, 10)  # a head of one row
        save_model(quantized, tmp_path)
        assert torch.equal(load_model(tmp_path, "cuda")(x.cuda()).cpu(), output)
