"""Which layers INT8 hurts, and what is left in floating point for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from workbench.artefact import load_model, save_model
from workbench.compress import QuantConfig, layer_sensitivity, mixed_precision, quantize
from workbench.compress.mixed import SCORED, _Samples, divergence
from workbench.errors import ConfigError, DataError, ModelError
from workbench.models import ModelConfig, build_model

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

NETS = Path(__file__).with_name("nets.py")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(x: Tensor) -> nn.Module:
    """One layer of it hardly fits into 8 bits: a channel so large that the input of ``conv3`` has few levels left."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"{NETS}:residual", num_classes=10, in_channels=1)).eval()
    with torch.no_grad():
        model.norm2.bias[0] += 3000
        model.conv3.weight[:, 0] = 0
        model.shortcut.weight[:, 0] = 0
        model.head.bias -= model(x).mean(0)  # so that predictions differ
    return model


def test_the_layers_of_few_levels_come_first(model: nn.Module, x: Tensor) -> None:
    config = QuantConfig(observer="minmax")
    table = layer_sensitivity(model, config, x)
    assert sorted(table["layer"]) == sorted(["stem.0", "conv1", "conv2", "conv3", "shortcut", "head"])
    assert set(table["layer"][:2]) == {"conv3", "shortcut"}
    assert (table["divergence"] >= 0).all() and table["divergence"].is_monotonic_decreasing
    assert table["divergence"][0] > 10 * table["divergence"][2]
    assert table.set_index("layer")["parameters"]["conv1"] == 8 * 8 * 9


def test_only_those_are_left_in_float(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    config = QuantConfig(observer="minmax")
    labels = model(x).argmax(1)
    data = [(x[:64], labels[:64]), (x[64:], labels[64:])]

    def agreement(variant: nn.Module) -> float:
        return (variant(x).argmax(1) == labels).float().mean().item()

    assert agreement(quantize(model, config, x)) < 0.97
    mixed = mixed_precision(model, config, data, max_loss=0.03)
    assert agreement(mixed) >= 0.97
    kept = mixed.structure.transforms[-1]["config"]["keep_float"]
    assert 1 <= len(kept) <= 4 and set(kept) & {"conv3", "shortcut"}
    state = mixed.state_dict()
    for layer in ("stem.0", "conv1", "conv2", "conv3", "shortcut", "head"):
        assert state[f"graph.{layer}.weight"].dtype == (torch.float32 if layer in kept else torch.int8)
    save_model(mixed, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), mixed(x))


def test_nothing_is_left_where_nothing_is_lost(model: nn.Module, x: Tensor) -> None:
    mixed = mixed_precision(model, QuantConfig(observer="minmax"), x, max_loss=1.0)
    assert mixed.structure.transforms[-1]["config"]["keep_float"] == []
    with pytest.raises(ModelError, match="QuantAwareTraining"):
        mixed_precision(model, None, x, measure=lambda variant: float(isinstance(variant, type(model))))


def test_one_batch_is_a_list_of_it_and_labels_end_with_the_samples(x: Tensor) -> None:
    labels = torch.arange(128) % 10
    assert _Samples((x, labels)).labels is not None and _Samples((x, labels)).inputs[0].shape == x.shape
    many = _Samples([(x, labels)] * 17)
    assert sum(map(len, many.inputs)) == len(many.labels) == SCORED
    assert _Samples([(x, labels), x]).labels is None and _Samples([(x, labels.float())]).labels is None


def test_divergence_is_that_of_the_definition() -> None:
    p, q = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    a, b = p.softmax(1).double(), q.softmax(1).double()
    assert divergence(q, p) == pytest.approx((a * (a / b).log()).sum().item(), rel=1e-6)
    assert divergence(p, p) == 0


def test_errors_name_the_remedy(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(DataError, match="Pass data="):
        layer_sensitivity(model)
    for call in (layer_sensitivity, mixed_precision):
        with pytest.raises(DataError, match="batch holds a dict"):
            call(model, None, [{"x": x}])
        with pytest.raises(DataError, match="data is a int"):
            call(model, None, 5)
        with pytest.raises(DataError, match="NaN"):
            call(model, None, x / 0)
        with pytest.raises(DataError, match=r"calibration samples, \[2, 28, 28\]"):
            call(model, None, x[:, 0])
        with pytest.raises(ModelError, match="is a str"):
            call("resnet18", None, x)
    for loss in (-1, float("nan"), 1.5):
        with pytest.raises(ConfigError, match=rf"max_loss={loss} must lie between 0 and 1"):
            mixed_precision(model, None, x, max_loss=loss)
    with pytest.raises(ConfigError, match="between 0 and inf"):
        mixed_precision(model, None, x, max_loss=-1, measure=lambda variant: 0.0)
    with pytest.raises(ConfigError, match="mode='static'"):
        layer_sensitivity(model, QuantConfig(mode="dynamic"), x)
