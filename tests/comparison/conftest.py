"""Small models and data that several tests compare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workbench.comparison import CompareConfig
from workbench.models import ModelConfig, build_model

QUICK = CompareConfig(rounds=3, compile=False, batch_sizes=[1, 8], reload=False, memory=False, attributions=0)


@pytest.fixture(scope="session")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="convnet", num_classes=4, in_channels=1, args={"widths": [8, 16]})).eval()


@pytest.fixture(scope="session")
def data(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Batches of 7, 7 and 6; labels are the model's own answers but for three samples."""
    x = torch.randn(20, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    return list(zip(x.split(7), y.split(7), strict=True))
