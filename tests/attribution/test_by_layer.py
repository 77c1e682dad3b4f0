"""Conductance and influence by layer, against the output's difference, Captum's own, and models whose layers are known."""

from __future__ import annotations

import pytest
import torch
from captum.attr import InternalInfluence, LayerConductance
from torch import Tensor, nn

from workbench.attribution import AttributionConfig, explain_layers
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model

FINE = AttributionConfig(steps=300)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3)]
    return nn.Sequential(*parts).double()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_whole_difference_flows_through_every_layer_of_a_chain(images: Tensor) -> None:
    model = network()
    found = explain_layers(model, images, 1, ["*"], AttributionConfig(batch_size=2))
    with torch.no_grad():
        difference = float((model(images) - model(torch.zeros_like(images)))[:, 1].mean())
    assert found.attrs["difference"] == pytest.approx(difference)
    assert list(found.layer) == [str(i) for i in range(6)]
    assert list(found.share) == pytest.approx([1.0] * 6, abs=5e-3)
    assert (found.absolute >= found.conductance.abs()).all()
    assert list(found.channels) == [4, 4, 64, 8, 8, 3]
    assert found.half.iloc[-1] == 1  # the output explained is one unit


def test_it_is_captums_conductance_and_influence(images: Tensor) -> None:
    model = network()
    found = explain_layers(model, images, 2, config=FINE).set_index("layer")
    for name in ("0", "3"):
        layer = model[int(name)]
        conductance = LayerConductance(model, layer).attribute(images, target=2, n_steps=300).detach()
        influence = InternalInfluence(model, layer).attribute(images, target=2, n_steps=100).detach()
        assert found.conductance[name] == pytest.approx(float(conductance.sum() / 5), rel=1e-2)
        assert found.absolute[name] == pytest.approx(float(conductance.abs().sum() / 5), rel=1e-2)
        assert found.influence[name] == pytest.approx(float(influence.flatten(1).norm(dim=1).mean()), rel=1e-2)


class Residual(nn.Module):
    """A branch and its skip; one activation, in place, used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branch, self.skip, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        out: Tensor = self.head(self.act(self.skip(x) + self.branch(x)))
        return out


def test_branches_share_what_flows_around_them() -> None:
    model = Residual().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = explain_layers(model, x, 0, ["*"], FINE).set_index("layer")
    assert list(found.index) == ["first", "act", "skip", "branch", "act (2)", "head"]
    assert found.share["branch"] + found.share["skip"] == pytest.approx(1, abs=1e-2)
    for name in ("first", "act", "act (2)", "head"):
        assert found.share[name] == pytest.approx(1, abs=1e-2), name
    with torch.no_grad():
        model.branch.weight.zero_()
    idle = explain_layers(model, x, 0, ["branch"], FINE)
    assert idle.conductance[0] == 0 and idle.influence[0] > 0  # it says nothing, though it would be heeded


def test_a_normalized_model_is_walked_slowly_where_it_wakes() -> None:
    """The first steps from an empty image change a normalization layer's output most."""
    torch.manual_seed(0)
    args = {"widths": [8, 16, 16]}
    model = build_model(ModelConfig(name="convnet", num_classes=4, in_channels=1, args=args)).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    found = explain_layers(model, x, 0)
    fine = explain_layers(model, x, 0, config=AttributionConfig(steps=400))
    assert list(fine.conductance) == pytest.approx([fine.attrs["difference"]] * len(fine), abs=0.01 * fine.absolute.max())
    assert list(found.conductance) == pytest.approx([found.attrs["difference"]] * len(found), abs=0.05 * found.absolute.max())
    assert list(found.absolute) == pytest.approx(list(fine.absolute), rel=0.2)


def test_the_path_of_token_ids_runs_through_embeddings() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="lstm", num_classes=3, args={"vocab_size": 30, "embedding": 6, "width": 5})).eval()
    ids = torch.randint(1, 30, (4, 7))
    found = explain_layers(model, ids, 1, config=AttributionConfig(steps=64)).set_index("layer")
    assert list(found.index) == ["embedding", "lstm", "attention", "classifier"]
    assert found.share[["embedding", "lstm", "classifier"]].tolist() == pytest.approx([1, 1, 1], abs=2e-2)


def test_the_model_is_left_alone(images: Tensor) -> None:
    model = network().train()
    explain_layers(model, images, 0)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_errors_name_the_remedy(images: Tensor) -> None:
    with pytest.raises(ConfigError, match="No layer is named 'layer9"):
        explain_layers(network(), images, 0, ["layer9.*"])
    with pytest.raises(ConfigError, match="none of the 3 classes"):
        explain_layers(network(), images, 3)

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x).detach()
            return out

    with pytest.raises(ModelError, match="no gradients"):
        explain_layers(Frozen(), torch.randn(2, 4))
