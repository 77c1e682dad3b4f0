"""Attributions on CUDA: the same credits as on the CPU, for recurrent layers too, whose cuDNN form has no backward pass then."""

from __future__ import annotations

import copy

import pytest
import torch

from workbench.attribution import METHODS, AttributionConfig, explain, explain_layers, most_wrong
from workbench.models import ModelConfig, build_model

CONFIG = AttributionConfig(draws=4, steps=8, batch_size=4)
LSTM = ModelConfig(name="lstm", num_classes=3, args={"vocab_size": 30, "embedding": 8, "width": 8})


@pytest.mark.parametrize("method", METHODS)
def test_credits_are_those_of_the_cpu(method: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="convnet", num_classes=4, in_channels=2, args={"widths": [8, 16]})).double()
    x = torch.randn(6, 2, 12, 12, dtype=torch.float64)
    there = explain(copy.deepcopy(model).cuda(), x.cuda(), 1, method, CONFIG)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), explain(model, x, 1, method, CONFIG), rtol=1e-6, atol=1e-9)


def test_a_recurrent_model_is_explained_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = build_model(LSTM).eval()
    ids = torch.randint(1, 30, (6, 9))
    on_gpu = copy.deepcopy(model).cuda()
    for method in ("integrated_gradients", "gradient_shap", "saliency", "occlusion"):
        found = explain(on_gpu, ids.cuda(), 1, method, CONFIG).cpu()
        torch.testing.assert_close(found, explain(model, ids, 1, method, CONFIG), rtol=1e-2, atol=1e-4)
    assert torch.backends.cudnn.enabled
    here, there = (explain_layers(net, x, 1, config=CONFIG) for net, x in ((model, ids), (on_gpu, ids.cuda())))
    assert list(there.conductance) == pytest.approx(list(here.conductance), rel=1e-2, abs=1e-4)


def test_batches_of_the_cpu_are_looked_through_on_the_models_device() -> None:
    torch.manual_seed(0)
    model = build_model(LSTM).cuda()
    data = [(torch.randint(1, 30, (5, 9)), torch.randint(0, 3, (5,))) for _ in range(3)]
    found = most_wrong(model, data, 4, config=CONFIG)
    assert len(found) == 4 and not found[0].x.is_cuda and not found[0].credits.is_cuda
