"""Attributions against closed forms, and what every method must keep to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import GradientShap, NoiseTunnel, Occlusion, Saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.attribution import METHODS, AttributionConfig, explain
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


# GradientSHAP -----------------------------------------------------------------------------------------------------------


def curved(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_gradient_shap_of_a_linear_model_is_its_expectation(linear: nn.Linear) -> None:
    x, background = torch.randn(4, 7, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    target = torch.tensor([0, 2, 1, 1])
    weight = linear.weight[target].detach()
    found = explain(linear, x, target, "gradient_shap", AttributionConfig(draws=12, batch_size=8), background)
    torch.testing.assert_close(found, weight * (x - background.mean(0)))  # each of the six is drawn twice
    about = AttributionConfig(baseline=0.3, draws=4)
    torch.testing.assert_close(explain(linear, x, target, "gradient_shap", about), weight * (x - 0.3))
    spread = about.override({"spread": 2.0, "draws": 4000, "batch_size": 4000})
    drawn = explain(linear, x, target, "gradient_shap", spread)
    assert ((drawn - weight * (x - 0.3)).abs() < 4.5 * 2.0 * weight.abs() / 4000**0.5).all()  # standard errors of the mean
    assert torch.equal(drawn, explain(linear, x, target, "gradient_shap", spread))
    assert not torch.equal(drawn, explain(linear, x, target, "gradient_shap", spread.override({"seed": 1})))


def test_gradient_shap_agrees_with_captums_and_sums_to_the_difference() -> None:
    model = curved()
    x, background = torch.randn(3, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2])
    found = explain(model, x, target, "gradient_shap", AttributionConfig(draws=2000, batch_size=6000), background)
    np.random.seed(0)  # noqa: NPY002 - Captum draws from the global generator
    captums = GradientShap(model).attribute(x, background, n_samples=4000, target=target)
    torch.testing.assert_close(found, captums, rtol=0, atol=0.03)
    with torch.no_grad():
        gained = model(x).gather(1, target[:, None])[:, 0] - model(background).mean(0)[target]
    torch.testing.assert_close(found.sum(1), gained, rtol=0, atol=0.01)


def test_gradient_shap_goes_through_embeddings() -> None:
    torch.manual_seed(0)
    model = Text().eval()
    ids, others = torch.tensor([[3, 7, 7, 0, 0], [5, 1, 9, 12, 0]]), torch.randint(1, 20, (4, 5))
    found = explain(model, ids, 2, "gradient_shap", AttributionConfig(draws=8), others)
    worth = (model.embedding(ids) - model.embedding(others).mean(0)) @ model.head.weight[2]
    torch.testing.assert_close(found, worth.detach() * (ids != 0), rtol=1e-4, atol=1e-6)


# Noise ------------------------------------------------------------------------------------------------------------------


def test_smoothing_adds_what_noise_adds_to_a_square() -> None:
    torch.manual_seed(0)
    factor = torch.rand(5, dtype=torch.float64) + 1
    x = torch.randn(3, 5, dtype=torch.float64)
    found = explain(lambda x: factor * x**2, x, 1, "input_x_gradient", AttributionConfig(noise=0.5, draws=800))
    expected = 2 * factor[1] * (x[:, 1] ** 2 + 0.25)  # E[(x + n) · 2a(x + n)]
    torch.testing.assert_close(found[:, 1], expected, rtol=0, atol=0.25)
    assert (found[:, [0, 2, 3, 4]] == 0).all()


def test_smoothing_agrees_with_captums_noise_tunnel() -> None:
    model = curved()
    with torch.no_grad():
        model[0].weight *= 5  # type: ignore[index]
    x = torch.randn(2, 5, dtype=torch.float64)
    found = explain(model, x, 1, "saliency", AttributionConfig(noise=0.7, draws=800))
    torch.manual_seed(0)
    captums = NoiseTunnel(Saliency(model)).attribute(x, nt_type="smoothgrad", nt_samples=3000, stdevs=0.7, target=1)
    torch.testing.assert_close(found, captums, rtol=0, atol=0.04)
    assert (found - explain(model, x, 1, "saliency")).abs().max() > 0.1


# Windows ----------------------------------------------------------------------------------------------------------------


def test_overlapping_windows_share_their_credit(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(288, 3))
    found = explain(model, images, 1, "occlusion", AttributionConfig(window=4, stride=2))
    captums = Occlusion(model).attribute(images, (2, 4, 4), strides=(2, 2, 2), target=1)
    torch.testing.assert_close(found, captums)
    worth = (model[1].weight[1].reshape(2, 12, 12) * images).sum(1).detach()  # type: ignore[index]
    windows = worth.unfold(1, 4, 2).unfold(2, 4, 2).sum((-1, -2))  # (N, 5, 5)
    torch.testing.assert_close(found[:, 1, 4, 4], windows[:, 1:3, 1:3].mean((1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 0, 0, 0], windows[:, 0, 0], rtol=1e-4, atol=1e-5)


def test_a_window_takes_spans_of_a_text_and_of_a_series() -> None:
    torch.manual_seed(0)
    model = Text().eval()
    ids = torch.tensor([[3, 7, 8, 2, 9, 4]])
    worth = (model.embedding(ids) @ model.head.weight[2]).detach()[0]
    found = explain(model, ids, 2, "occlusion", AttributionConfig(window=2))
    torch.testing.assert_close(found[0], worth.reshape(3, 2).sum(1).repeat_interleave(2), rtol=1e-4, atol=1e-6)
    series = torch.randn(2, 6, 3)
    found = explain(lambda x: x.sum((1, 2))[:, None], series, 0, "occlusion", AttributionConfig(window=3))
    torch.testing.assert_close(found[:, :3], series[:, :3].sum((1, 2))[:, None, None].expand(2, 3, 3))


def test_columns_of_a_group_go_together(linear: nn.Linear) -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    worth = linear.weight[2].detach() * x
    found = explain(linear, x, 2, "occlusion", AttributionConfig(groups=((1, 5), (6, 0, 2))))
    torch.testing.assert_close(found[:, [1, 5]], worth[:, [1, 5]].sum(1, keepdim=True).expand(4, 2))
    torch.testing.assert_close(found[:, [0, 2, 6]], worth[:, [0, 2, 6]].sum(1, keepdim=True).expand(4, 3))
    torch.testing.assert_close(found[:, [3, 4]], worth[:, [3, 4]])


# Axioms -----------------------------------------------------------------------------------------------------------------

TABULAR = [name for name in METHODS if name != "gradcam"]


@pytest.mark.parametrize("method", TABULAR)
@given(values=st.lists(st.floats(-2, 2), min_size=3, max_size=3), factor=st.floats(-2, 2))
@settings(max_examples=12)
def test_what_does_nothing_has_no_credit_and_equals_have_equal_credit(method: str, values: list[float], factor: float) -> None:
    """Dummy and symmetry (Sundararajan et al. 2017): column 3 is not looked at, columns 0 and 1 are looked at alike."""
    same, other, idle = values
    x = torch.tensor([[same, same, other, idle]], dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(factor * (x[:, 0] + x[:, 1])) * x[:, 2] + x[:, 0] * x[:, 1], x[:, 2]], 1)

    found = explain(model, x, 0, method, AttributionConfig(draws=4, steps=8))[0]
    assert found[3] == 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("method", METHODS)
def test_no_call_is_larger_than_asked_for(network: nn.Module, images: Tensor, method: str) -> None:
    sizes = []
    hook = network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    explain(network, images, 0, method, AttributionConfig(batch_size=4, steps=5, draws=5, patches=2))
    hook.remove()
    assert max(sizes) <= 4


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"stride": 2}, "moves a window"),
        ({"window": 2, "stride": 3}, "gaps"),
        ({"groups": [[0, 1], [1]]}, "at most once"),
        ({"noise": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_refused(settings_: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        AttributionConfig(**settings_)


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda net, x: explain(net, x, 0, "saliency", background=x), "no baselines"),
        (lambda net, x: explain(net, x, 0, "occlusion", AttributionConfig(window=13)), "larger than the input"),
        (lambda net, x: explain(net, x, 0, "occlusion", AttributionConfig(groups=((0, 1),))), "columns of a table"),
        (lambda net, x: explain(nn.Linear(4, 2), x[0, 0, :, :4], 0, "occlusion", AttributionConfig(window=2)), "no order"),
        (lambda net, x: explain(nn.Linear(4, 2), x[0, 0, :, :4], 0, "occlusion", AttributionConfig(groups=((4,),))), "beyond"),
        (lambda net, x: explain(Text(), torch.ones(1, 3, dtype=torch.int64), 0, "saliency", AttributionConfig(noise=1)), "ids"),
    ],
)
def test_what_an_input_does_not_take_is_said(
    network: nn.Module, images: Tensor, ask: Callable[[nn.Module, Tensor], Tensor], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        ask(network, images)
