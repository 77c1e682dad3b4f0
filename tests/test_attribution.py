"""Attributions against closed forms, and what every method must keep to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workbench.attribution import AttributionConfig, explain
from workbench.compress import QuantConfig, quantize
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model


class Text(nn.Module):
    """A mean of embeddings over the tokens that aren't padding, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0)[..., None]
        out: Tensor = self.head((self.embedding(ids) * mask).sum(1))
        return out


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="convnet", num_classes=4, in_channels=2, args={"widths": [8, 16]})).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 2, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def linear() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(7, 3, dtype=torch.float64)


@pytest.mark.parametrize("method", ["integrated_gradients", "input_x_gradient", "occlusion", "feature_ablation"])
def test_of_a_linear_model_credit_is_weight_times_input(linear: nn.Linear, method: str) -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    baseline = 0.0 if method == "input_x_gradient" else 0.3
    target = torch.tensor([0, 2, 1, 1])
    found = explain(linear, x, target, method, AttributionConfig(baseline=baseline))
    torch.testing.assert_close(found, linear.weight[target].detach() * (x - baseline))


def test_of_a_linear_model_saliency_is_the_weight(linear: nn.Linear) -> None:
    found = explain(linear, torch.randn(2, 7, dtype=torch.float64), 1, "saliency")
    torch.testing.assert_close(found, linear.weight[1].detach().abs().expand(2, 7))


def test_integrated_gradients_sum_to_the_difference(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(400, 8), nn.GELU(), nn.Linear(8, 4)).double()
    x = images.double()
    target = model(x).argmax(1)
    found = explain(model, x)
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x)))[range(5), target]
    torch.testing.assert_close(found.sum((1, 2, 3)), difference, rtol=1e-5, atol=1e-6)


def test_occlusion_is_what_a_patch_is_worth(network: nn.Module, images: Tensor) -> None:
    found = explain(network, images, 3, "occlusion", AttributionConfig(patches=3, batch_size=4))
    without = images.clone()
    without[:, :, 4:8, 8:12] = 0
    with torch.no_grad():
        worth = (network(images) - network(without))[:, 3]
    torch.testing.assert_close(found[:, :, 4:8, 8:12], worth[:, None, None, None].expand(5, 2, 4, 4), rtol=1e-4, atol=1e-5)


def test_gradcam_looks_where_the_channel_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight[0, 0, 1, 1] = 1  # type: ignore[index,union-attr]
        model[4].weight[1, 0] = 1  # type: ignore[index,union-attr]
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 2, 5] = 1
    found = explain(model, x, 1, "gradcam")
    assert found.shape == (1, 1, 8, 8)
    assert (found[0, 0] / found.max()).round().nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize("method", ["integrated_gradients", "saliency", "input_x_gradient", "occlusion", "feature_ablation"])
def test_tokens_are_credited_one_by_one(method: str) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    ids = torch.tensor([[3, 7, 7, 0, 0], [5, 1, 9, 12, 0]])
    found = explain(model, ids, 2, method)
    assert found.shape == ids.shape
    assert (found[ids == 0] == 0).all()
    worth = (model.embedding(ids) @ model.head.weight[2]).detach() * (ids != 0)
    if method == "saliency":
        worth = model.head.weight[2].detach().norm() * (ids != 0)
    torch.testing.assert_close(found, worth, rtol=1e-4, atol=1e-6)


def test_quantized_graphs_are_explained_by_occlusion_only(network: nn.Module, images: Tensor) -> None:
    int8 = quantize(network, QuantConfig(), images)
    target = network(images).argmax(1)
    for method in ("integrated_gradients", "saliency", "gradcam"):
        with pytest.raises(ModelError, match="occlusion|convolution"):
            explain(int8, images, target, method)
    float_credits = explain(network, images, target, "occlusion")
    credits = explain(int8, images, target, "occlusion")
    assert nn.functional.cosine_similarity(float_credits.flatten(1), credits.flatten(1)).min() > 0.95


def test_errors_name_the_remedy(network: nn.Module, images: Tensor) -> None:
    with pytest.raises(ConfigError, match="none of the 4 classes"):
        explain(network, images, 4)
    with pytest.raises(ConfigError, match="Did you mean 'saliency'"):
        explain(network, images, method="salience")
    with pytest.raises(ConfigError, match="no layer 'nowhere'"):
        explain(network, images, 0, "gradcam", AttributionConfig(layer="nowhere"))
    with pytest.raises(ConfigError, match="for images"):
        explain(nn.Linear(4, 2), torch.randn(2, 4), 0, "gradcam")
    with pytest.raises(ModelError, match="has none"):
        explain(lambda ids: ids[:, :2].float(), torch.ones(2, 4, dtype=torch.int64), 0, "saliency")
