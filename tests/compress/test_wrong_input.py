"""What people get wrong: refused in words that name the value and the remedy, before anything is changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compress.nets import Tied
from workbench.comparison import CompareConfig, compare
from workbench.compress import (
    GradualConfig,
    PruneConfig,
    QuantAwareTraining,
    compiled,
    distill,
    prune,
    prune_gradually,
    quantize,
    sensitivity,
)
from workbench.errors import ConfigError, DataError, ModelError, WorkbenchError
from workbench.models import ModelConfig, build_model
from workbench.training import TrainConfig, TrainResult

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WIDER = X.repeat(1, 1, 1, 2)
Y = torch.arange(8)
TUNE = TrainConfig(data={"name": "digits"})
QUICK = CompareConfig(compile=False, reload=False, memory=False, attributions=0, seconds=0.1, rounds=3)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 4})).eval()


@functools.cache
def int8() -> nn.Module:
    return quantize(resnet(), None, X)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x) + self.second(y)


def nan_at_the_end() -> Tensor:
    x = X.clone()
    x[-1, 0, 2, 2] = float("nan")
    return x


def diverged() -> nn.Module:
    model = resnet()
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("inf")
    return model


def two_of_one_weight() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


WRONG: dict[str, tuple[Callable[[], Any], type[WorkbenchError], str]] = {
    "a number for settings": (lambda: prune(resnet(), 0.3, X), ConfigError, "config is a float, not a PruneConfig. Build one"),
    "a dict for settings": (lambda: quantize(resnet(), {"mode": "static"}, X), ConfigError, r"QuantConfig\(\*\*settings\)"),
    "settings of another verb": (lambda: prune(resnet(), GradualConfig(), X), ConfigError, "GradualConfig, not a PruneConfig"),
    "one-shot settings in steps": (lambda: prune_gradually(resnet(), PruneConfig(), TUNE, X), ConfigError, "not a GradualConfig"),
    "no settings to distil by": (lambda: distill(resnet(), resnet(), PruneConfig()), ConfigError, "not a TrainConfig"),
    "a result for a model": (lambda: prune(TrainResult(None, resnet(), None)), ModelError, "Pass the module that it holds"),
    "a name for a model": (lambda: quantize("resnet18", None, X), ModelError, "The model is a str"),
    "a name to compile": (lambda: compiled("resnet18"), ModelError, "The model is a str"),
    "an array for an example": (lambda: prune(resnet(), None, X.numpy()), ConfigError, "The example is a ndarray"),
    "an example without a batch": (lambda: prune(resnet(), None, X[0]), DataError, r"doesn't take the example, \[1, 8, 8\]"),
    "an example of other channels": (lambda: prune(resnet(), None, X.repeat(1, 3, 1, 1)), DataError, r"\[1, 3, 8, 8\] of "),
    "an example of another type": (lambda: prune(resnet(), None, X.double()), DataError, "of float64"),
    "two inputs to prune": (lambda: prune(TwoInputs(), None, X[:, 0, 0]), DataError, "wrap a model of several inputs"),
    "two inputs to quantize": (lambda: quantize(TwoInputs(), None, X[:, 0, 0]), DataError, "take the calibration samples"),
    "samples of other channels": (lambda: quantize(resnet(), None, X.repeat(1, 3, 1, 1)), DataError, r"\[2, 3, 8, 8\]"),
    "samples of another type": (lambda: quantize(resnet(), None, X.double()), DataError, "of float64"),
    "samples of two sizes": (lambda: quantize(resnet(), None, [X, X[..., :4]]), DataError, r"\[1, 8, 8\] .* then \[1, 8, 4\]"),
    "another size than the graph's": (lambda: int8()(WIDER), DataError, r"\[N, 1, 8, 8\] of .* \[8, 1, 8, 16\] .* quantize"),
    "another type than the graph's": (lambda: int8()(X.double()), DataError, "of float32, .* of float64"),
    "another size, compiled": (lambda: compiled(int8())(WIDER), DataError, r"\[N, 1, 8, 8\] of .* \[8, 1, 8, 16\]"),
    "NaN in a sample": (lambda: quantize(resnet(), None, nan_at_the_end()), DataError, "NaN or infinite"),
    "an infinite weight": (lambda: quantize(diverged(), None, X), ModelError, "'classifier.weight' holds NaN"),
    "weights of 16 bits": (lambda: quantize(resnet().half(), None, X.half()), ModelError, r"float16; .* model.float\(\)"),
    "weights of 64 bits": (lambda: quantize(resnet().double(), None, X.double()), ModelError, "float64"),
    "quantized, then pruned": (lambda: prune(int8(), None, X), ModelError, "Prune first, then quantize"),
    "quantized, then trained for it": (lambda: QuantAwareTraining(int8(), None, X).prepare(), ModelError, "quantized already"),
    "other settings to train for": (lambda: QuantAwareTraining(resnet(), PruneConfig()), ConfigError, "not a QuantConfig"),
    "percent for a fraction": (lambda: sensitivity(resnet(), [(X, Y)], (0.5,)).suggestion(1), ConfigError, "drop=1 must lie"),
    "variants without names": (lambda: compare([resnet()], [(X, Y)]), ConfigError, "by its name"),
    "a number for a variant": (lambda: compare({"a": 5}, [(X, Y)]), ConfigError, "A variant is a int"),
    "a variant of other inputs": (
        lambda: compare({"a": resnet(), "b": TwoInputs()}, [(X, Y)], QUICK),
        DataError,
        r"variant 'b' doesn't take the data, \[1, 1, 8, 8\]",
    ),
    "a folder to keep rows in": (lambda: sensitivity(resnet(), [(X, Y)], (0.5,), path="."), ConfigError, "'.' is a folder"),
    "nothing but shared weights": (lambda: prune(two_of_one_weight(), None, X[:, 0, 0]), ModelError, "it shares a weight with"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_in_words(name: str) -> None:
    call, kind, words = WRONG[name]
    with pytest.raises(kind, match=words) as caught:
        call()
    assert caught.value.what and caught.value.remedy


def test_one_batch_calibrates_like_a_list_of_it() -> None:
    with torch.no_grad():
        assert torch.equal(quantize(resnet(), None, (X, Y))(X), quantize(resnet(), None, [(X, Y)])(X))


def test_a_half_precision_model_is_pruned_without_an_example() -> None:
    assert {parameter.dtype for parameter in prune(resnet().half()).parameters()} == {torch.float16}


def test_guessing_an_input_leaves_a_model_in_training_as_it_is() -> None:
    model = resnet().train()
    before = copy.deepcopy(model.state_dict())
    prune(model)
    with pytest.raises(ConfigError, match="belongs|other settings|digits|layer"):
        prune_gradually(model, GradualConfig(steps=1, ignored=["nothing"]), TUNE)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_that_share_a_weight_stay_whole_and_the_others_are_pruned() -> None:
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 50, (4, 6))
    pruned = prune(model, PruneConfig(ratio=0.3), ids)
    assert pruned.out.weight is pruned.table.weight and pruned.out.weight.shape == (50, 16)
    assert pruned.up.out_features < 64 and pruned(ids).shape == (4, 50)
    assert "shares a weight" in pruned.structure.transforms[-1]["whole"]["table"]


def test_a_model_of_bfloat16_becomes_int8() -> None:
    model, x = resnet().bfloat16(), X.bfloat16()
    int8 = quantize(model, None, x)
    with torch.no_grad():
        expected, found = resnet()(X), int8(x).float()
    assert int8(x).dtype == torch.bfloat16 and (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("value", [0, "automatic"])
def test_a_setting_of_two_kinds_is_explained_once(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig(round_to=value)
    assert caught.value.what.startswith(f"round_to={value!r} must be 'auto', or ") and caught.value.what.count("round_to") == 1
