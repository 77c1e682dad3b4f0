"""Peak memory against arithmetic, and against what the operating system saw."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from workbench.allocator import tensor_bytes
from workbench.comparison.forms import Form, _Plain
from workbench.comparison.memory import peak_bytes
from workbench.compress import QuantConfig, compiled, quantize
from workbench.compress.compilation import has_compiler


def form_of(model: nn.Module, call: object = None) -> Form:
    return Form("m", "eager fp32", "eager", call or _Plain(model.eval()), model)  # type: ignore[arg-type]


def perceptron(*widths: int) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU(inplace=True)) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*layers)


def test_it_is_the_weights_and_the_two_activations_alive_at_once() -> None:
    model = perceptron(300, 500, 700, 10)
    weights = 4 * sum(p.numel() for p in model.parameters())
    for batch in (1, 64):
        assert peak_bytes(form_of(model), torch.randn(batch, 300)) == weights + 4 * batch * (500 + 700)


def test_every_storage_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight  # type: ignore[union-attr]
    model.register_buffer("part", model[0].weight.data[:2])  # type: ignore[union-attr,index]
    assert tensor_bytes(model) == 4 * 64


def test_int8_weights_count_as_bytes() -> None:
    model = perceptron(256, 256, 256)
    int8 = quantize(model, QuantConfig(mode="dynamic"))
    assert tensor_bytes(model) / 4 < tensor_bytes(int8) < tensor_bytes(model) / 3


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compiled_form_holds_its_own_copy_of_the_weights() -> None:
    model = perceptron(512, 1024, 512)
    weights = tensor_bytes(model)
    x = torch.randn(4, 512)
    fast = peak_bytes(form_of(model, compiled(model)), x)
    lower = peak_bytes(form_of(copy.deepcopy(model), compiled(model, torch.bfloat16)), x)
    assert 1.9 * weights < fast
    assert 1.4 * weights < lower < 1.7 * weights < fast


RESIDENT = """
import torch
from torch import nn

def highest():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

with torch.no_grad():
    nn.Linear(8, 8)(torch.zeros(1, 8))
    x = torch.ones(500, 2000)
    before = highest()
    model = nn.Sequential(nn.Linear(2000, 20000), nn.ReLU(inplace=True), nn.Linear(20000, 10))
    model(x)
print(highest() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set as Linux counts it")
def test_the_operating_system_agrees() -> None:
    """In a fresh process, where imports are known and nothing was compiled, the resident set rises by as much."""
    told = subprocess.run(
        [sys.executable, "-c", RESIDENT], check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    model = nn.Sequential(nn.Linear(2000, 20000), nn.ReLU(inplace=True), nn.Linear(20000, 10))
    measured = peak_bytes(form_of(model), torch.ones(500, 2000))
    assert float(told.stdout) == pytest.approx(measured, rel=0.1)
