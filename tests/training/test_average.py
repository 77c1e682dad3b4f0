"""The averaged weights: their formula, what is evaluated and kept, resuming, ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench import TrainConfig, launch, train
from workbench.training.average import WeightAverage

pytestmark = pytest.mark.usefixtures("forked")


def test_an_average_is_the_weighted_mean_of_all_weights_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, decay=0.9)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 200):
        model(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        decay = 0.0 if step == 1 else min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected.get(name, 0 * value.double()) + (1 - decay) * value.double()
    assert set(average.state) == set(expected) and "1.running_var" in expected
    for name, value in average.state.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_model_has_the_average_within_and_its_own_weights_after() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, decay=0.5)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    for value in average.state.values():
        value.add_(1)
    with average.swapped():
        assert torch.equal(model[0].weight, own["0.weight"] + 1) and torch.equal(model[1].running_var, own["1.running_var"] + 1)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    average.apply()
    assert torch.equal(model[0].weight, own["0.weight"] + 1)


def test_observers_that_begin_at_infinity_are_averaged_from_what_they_see() -> None:
    model = nn.Module()
    model.register_buffer("least", torch.tensor(float("inf")))
    average = WeightAverage(model, decay=0.5)
    for step in (1, 2, 3):
        model.least.fill_(2.0)
        average.update(step)
    assert float(average.state["least"]) == 2.0


def test_without_decay_nothing_is_kept() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.0)
    weight = model.weight.detach().clone()
    average.update(1)
    with average.swapped():
        assert torch.equal(model.weight, weight)
    average.apply()
    assert average.state == {} and torch.equal(model.weight, weight)


@pytest.mark.parametrize("net", ["net", "normed"])
def test_a_run_trains_as_without_and_keeps_and_evaluates_the_average(
    net: str, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    name = config().model.name.replace(":net", f":{net}")
    plain, averaged = (train(config(model__name=name, ema=ema), root=tmp_path) for ema in (0.0, 0.9))
    assert plain.run.history["loss"].equals(averaged.run.history["loss"])
    kept = dict(averaged.run.load_model().named_parameters())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in averaged.model.named_parameters())
    assert any(not torch.equal(parameter, kept[name]) for name, parameter in plain.model.named_parameters())
    assert averaged.metrics["val_loss"] != plain.metrics["val_loss"]
    again = train(config(model__name=name, ema=0.0, epochs=1, optim__lr=1e-12), model=averaged.model, root=tmp_path)
    assert again.metrics["val_loss"] == pytest.approx(averaged.metrics["val_loss"], rel=0.05 if net == "normed" else 1e-5)


def test_a_run_resumes_with_its_average_bit_for_bit(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    chosen = config(ema=0.9, model__name=config().model.name.replace(":net", ":normed"))
    whole = train(chosen, root=tmp_path).run
    stopped = train(chosen, root=tmp_path, replay=[(11, "stop", {})]).run
    assert stopped.status == "stopped"
    assert_same(stopped.resume().wait(timeout=120), whole)


def test_two_ranks_have_the_average_of_one(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    chosen = config(**{"ema": 0.9, "epochs": 2, "model.args": {"dropout": 0.0}})
    alone = train(chosen, root=tmp_path).run
    two: Any = launch(chosen, nproc=2, root=tmp_path).wait(timeout=120)
    np.testing.assert_allclose(two.history["val_loss"].dropna(), alone.history["val_loss"].dropna(), atol=1e-5)
    weights = [dict(run.load_model().named_parameters()) for run in (alone, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-4)
