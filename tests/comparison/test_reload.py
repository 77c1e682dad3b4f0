"""What comes back from disk in a fresh process, and what doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.comparison.conftest import QUICK
from workbench import PruneConfig, QuantConfig, compare, prune, quantize, save_model
from workbench.models import ModelConfig, build_model

FORGETFUL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.head = nn.Linear(144, num_classes)
        self.extra = 0.0

    def forward(self, x):
        return self.head(x.flatten(1)) + self.extra
"""


@pytest.mark.slow
def test_what_was_saved_comes_back_bit_by_bit(model: nn.Module, data: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    pruned = prune(model, PruneConfig(ratio=0.46, round_to=1), data[0])
    int8 = quantize(pruned, QuantConfig(), data)
    with pytest.warns(UserWarning, match="takes linear layers"):
        dynamic = quantize(model, QuantConfig(mode="dynamic"))
    folder = save_model(model, tmp_path / "saved")
    (tmp_path / "net.py").write_text(FORGETFUL)
    forgetful = build_model(ModelConfig(name=f"{tmp_path / 'net.py'}:Net", num_classes=4)).eval()
    forgetful.extra = 0.5  # type: ignore[assignment]
    (tmp_path / "gone.py").write_text(FORGETFUL)
    gone = build_model(ModelConfig(name=f"{tmp_path / 'gone.py'}:Net", num_classes=4)).eval()
    (tmp_path / "gone.py").unlink()
    variants = {
        "model": model,
        "saved": folder,
        "pruned": pruned,
        "int8": int8,
        "dynamic": dynamic,
        "forgetful": forgetful,
        "gone": gone,
        "foreign": nn.Sequential(nn.Flatten(), nn.Linear(144, 4)),
    }
    result = compare(variants, data, QUICK.override({"reload": True}))
    reloads = {row.variant: row.reload for row in result.measurements}
    assert {name: reloads[name] for name in list(variants)[:5]} == dict.fromkeys(list(variants)[:5], "bit-equal")
    assert reloads["forgetful"] == "differs by 5.0e-01"
    assert reloads["gone"].startswith("fails: ") and "gone.py" in reloads["gone"]
    assert reloads["foreign"].startswith("weights only")
    assert [flag.variant for flag in result.flags if flag.what == "reload"] == ["forgetful", "gone"]
    assert "not back" not in str(result) and ">✓<" in result.to_html()


def test_it_leaves_nothing_behind(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    before = torch.get_num_threads(), model.training
    assert compare({"m": model}, data, QUICK).measurements[0].reload == "not checked"
    assert (torch.get_num_threads(), model.training) == before
