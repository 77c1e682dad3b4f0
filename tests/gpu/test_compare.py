"""Comparing on a GPU: its forms, its memory, and what was quantized for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workbench import QuantConfig, compare, quantize
from workbench.comparison import CompareConfig
from workbench.errors import ConfigError
from workbench.models import ModelConfig, build_model

QUICK = CompareConfig(rounds=5, batch_sizes=[1, 16], attributions=2)


def test_memory_is_what_the_allocator_saw() -> None:
    model = nn.Sequential(nn.Linear(1000, 4000), nn.ReLU(inplace=True), nn.Linear(4000, 1000)).cuda()
    data = [(torch.randn(64, 1000), torch.zeros(64, dtype=torch.int64))]
    config = QUICK.override({"compile": False, "batch_sizes": [64], "attributions": 0})
    row = compare({"m": model}, data, config).measurements[0]
    assert row.form == "eager fp32" and row.memory_bytes is not None
    expected = 4 * (sum(p.numel() for p in model.parameters()) + 64 * 5000)
    assert expected <= row.memory_bytes < 1.1 * expected


def test_quantized_for_the_gpu_stands_beside_bf16() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="vit_tiny_patch16_224", num_classes=10)).eval()
    x = torch.randn(32, 3, 224, 224)
    with torch.no_grad():
        y = model.cuda()(x.cuda()).argmax(1).cpu()
    variants = {"model": model, "int8": quantize(model, QuantConfig(mode="dynamic", backend="cuda"))}
    if torch.cuda.get_device_capability() >= (8, 9):
        variants["fp8"] = quantize(model, QuantConfig(mode="fp8", backend="cuda"))
    result = compare(variants, [(x, y)], QUICK)
    forms = [(row.variant, row.form) for row in result.measurements]
    assert forms[:3] == [("model", "eager fp32"), ("model", "compiled bf16"), ("int8", "compiled int8")]
    assert "NVIDIA" in result.conditions["device"]
    frame = result.frame()
    assert (frame.reload == "bit-equal").all(), frame.reload
    assert frame.macs.nunique() == 1 and frame.agreement.min() > 0.7
    assert frame.origin[2] == "model, compiled bf16" and frame.speed_ratio[1] == 1
    assert frame.memory_bytes.notna().all() and len(result.moved) == 2 * (len(variants) - 1)
    print(result)


def test_variants_for_two_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    x, y = torch.randn(16, 64), torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ConfigError, match="one device at a time"):
        compare({"m": model, "int8": quantize(model, QuantConfig(), x)}, [(x, y)], QUICK.override({"device": "cuda"}))
