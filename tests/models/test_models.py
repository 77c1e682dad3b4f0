"""Models by name: sizes as published, arguments, saved folders, names checked without importing timm."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.artefact import save_model
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model, structure_of
from workbench.models.structure import is_channels_last, lay_out


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("resnet18_cifar", 11.17)],
)
def test_a_network_has_the_parameters_that_its_paper_gives(name: str, millions: float) -> None:
    model = build_model(ModelConfig(name=name, num_classes=10, in_channels=3))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == pytest.approx(millions, abs=0.011)
    depth = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) + 1
    assert depth == int("".join(c for c in name.removesuffix("_cifar") if c.isdigit()))


def test_samples_of_a_group_normed_network_do_not_depend_on_their_batch() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="convnet", num_classes=4, in_channels=1, args={"widths": [8], "groups": 4})).train()
    x = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-5, atol=1e-6)


def test_a_model_of_timm_is_built_by_its_name() -> None:
    pytest.importorskip("timm")
    model = build_model(ModelConfig(name="test_resnet", num_classes=5, in_channels=1))
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert structure_of(model).model is not None


def test_a_saved_model_is_a_model_to_start_from(tmp_path: Path) -> None:
    model = build_model(ModelConfig(name="mlp", num_classes=3, in_channels=1, args={"widths": [4]})).eval()
    save_model(model, tmp_path / "saved")
    again = build_model(ModelConfig(name=str(tmp_path / "saved")))
    x = torch.randn(2, 1, 8, 8)
    assert again.training and torch.equal(again.eval()(x), model(x))


def test_a_users_function_need_not_know_of_classes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef net(size=3): return nn.Linear(size, 2)\n")
    model = build_model(ModelConfig(name=f"{tmp_path}/mine.py:net", num_classes=9, in_channels=1, args={"size": 5}))
    assert model.in_features == 5


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ("return 3", ModelError, "returned int.*Return a torch.nn.Module"),
        ("raise MemoryError('too large')", ModelError, "could not be built: MemoryError: too large"),
    ],
)
def test_a_factory_that_fails_says_why(body: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def net(**shape):\n    {body}\n")
    with pytest.raises(error, match=words):
        build_model(ModelConfig(name=f"{tmp_path}/mine.py:net"))


def test_names_are_checked_without_importing_timm() -> None:
    code = (
        "import sys\nfrom workbench.models.config import ModelConfig\nModelConfig(name='resnet18')\n"
        "print('timm' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(ConfigError, match="Did you mean 'convnet'"):
        ModelConfig(name="convnett")


def test_convolutions_that_a_cpu_computes_wrongly_are_not_put_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strided 1×1 convolution of few channels, where there is AVX2 and no more; its gradient is right as it then lies."""
    few, many = (nn.Sequential(nn.Conv2d(3, count, 3), nn.Conv2d(count, 16, 1, stride=2)) for count in (5, 8))
    for capability, expected in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert lay_out(few, torch.device("cpu")) == expected == is_channels_last(few)
        assert lay_out(many, torch.device("cpu")) and is_channels_last(many)
    monkeypatch.undo()
    lay_out(few, torch.device("cpu"))
    exact, x = copy.deepcopy(few).double(), torch.randn(8, 3, 12, 12)
    few(x).square().sum().backward()
    exact(x.double()).square().sum().backward()
    torch.testing.assert_close(few[1].weight.grad.double(), exact[1].weight.grad, rtol=1e-4, atol=1e-3)
