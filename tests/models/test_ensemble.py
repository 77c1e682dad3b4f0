"""Several models as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench import PruneConfig, load_model, prune, save_model
from workbench.errors import ModelError
from workbench.models import ModelConfig, build_model
from workbench.models.ensemble import ensemble_of


def test_it_gives_the_mean_probability_of_its_members_and_comes_back_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    members = [build_model(ModelConfig(name="convnet", num_classes=5, in_channels=1)).eval() for _ in range(3)]
    joined = ensemble_of(members).eval()
    x = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        expected = torch.stack([member(x).double().softmax(1) for member in members]).mean(0)
        torch.testing.assert_close(joined(x).double().exp(), expected, atol=1e-6, rtol=1e-5)
        save_model(joined, tmp_path)
        assert torch.equal(load_model(tmp_path)(x), joined(x))


def test_changed_models_are_refused() -> None:
    model = build_model(ModelConfig(name="resnet20", num_classes=5, in_channels=1))
    with pytest.raises(ModelError, match="isn't as a name builds it"):
        ensemble_of([model, prune(model, PruneConfig(), torch.zeros(1, 1, 8, 8))])
    with pytest.raises(ModelError, match="no models"):
        ensemble_of([])
