"""Compiled and captured inference on CUDA."""

from __future__ import annotations

import torch
from torch import nn

from workbench.compress import compiled
from workbench.compress.capture import Captured
from workbench.compress.latency import latency_of


def test_each_shape_and_layout_has_its_graph_and_outputs_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).cuda().eval()
    calls: list[int] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        with torch.no_grad():
            return model(x)

    captured = Captured(call)
    inputs = [torch.randn(n, 3, 8, 8, device="cuda") for n in (4, 2, 4)]
    inputs.append(inputs[0].to(memory_format=torch.channels_last))
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    found = [captured(x) for x in inputs]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    before = len(calls)
    assert torch.equal(captured(inputs[1]), found[1])
    assert len(calls) == before  # replayed


def test_several_compiled_models_take_turns() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10)).cuda().eval() for width in (32, 48)]
    fast = [compiled(model, torch.bfloat16) for model in models]
    x = torch.randn(16, 64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            for model, quick in zip(models, fast, strict=True):
                torch.testing.assert_close(quick(x).float(), model(x), rtol=5e-2, atol=5e-2)
    taken = latency_of({str(i): lambda quick=quick: quick(x) for i, quick in enumerate(fast)}, rounds=5, seconds=1)
    assert all(min(values) > 0 for values in taken.values())
