"""Penalties: their formulas in double precision, and runs whose weights they shrink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench import TrainConfig, launch, train
from workbench.errors import ConfigError, ModelError
from workbench.regularizers import group_lasso, l1, orthogonal, slimming

pytestmark = pytest.mark.usefixtures("forked")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    nn.init.normal_(net[1].weight)  # type: ignore[arg-type]
    return net


def test_penalties_are_their_formulas() -> None:
    net = model()
    kernel, matrix = (net[index].weight.detach().double().numpy() for index in (0, 3))
    scale = net[1].weight.detach().double().numpy()
    assert float(slimming(net).detach()) == pytest.approx(np.abs(scale).sum())
    assert float(l1(net).detach()) == pytest.approx(np.abs(kernel).sum() + np.abs(matrix).sum(), rel=1e-6)
    groups = [kernel[i] for i in range(3)] + [kernel[:, i] for i in range(2)]
    groups += [matrix[i] for i in range(4)] + [matrix[:, i] for i in range(12)]
    assert float(group_lasso(net).detach()) == pytest.approx(sum(np.linalg.norm(group.ravel()) for group in groups), rel=1e-6)
    flat = kernel.reshape(3, -1)
    expected = ((flat @ flat.T - np.eye(3)) ** 2).sum() + ((matrix @ matrix.T - np.eye(4)) ** 2).sum()
    assert float(orthogonal(net).detach()) == pytest.approx(expected, rel=1e-5)


def test_orthogonal_columns_are_no_penalty_whichever_way_a_matrix_is_longer() -> None:
    for shape in ((3, 7), (7, 3)):
        net = nn.Sequential(nn.Linear(shape[1], shape[0]))
        nn.init.orthogonal_(net[0].weight)  # type: ignore[arg-type]
        assert float(orthogonal(net).detach()) == pytest.approx(0, abs=1e-10)


def test_a_channel_that_is_zero_has_a_finite_gradient() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight[1] = 0  # type: ignore[operator, index]
    (group_lasso(net) + slimming(net) + l1(net)).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 32},
        model={"name": "resnet20", "args": {"width": 4}},
        optim={"name": "sgd", "lr": 0.05},
        epochs=2,
        device="cpu",
        checkpoint={"every_epochs": 0},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


def test_the_loss_that_is_reported_holds_the_penalty_and_the_evaluation_does_not(tmp_path: Path) -> None:
    mlp = {"model__name": "mlp", "model__args": {"widths": [16]}, "optim__lr": 1e-9, "epochs": 1}
    plain, penalized = (train(config(penalties=penalties, **mlp), root=tmp_path) for penalties in ({}, {"l1": 0.01}))
    added = penalized.run.history["loss"] - plain.run.history["loss"]
    np.testing.assert_allclose(added, 0.01 * float(l1(plain.model).detach()), rtol=1e-4)
    assert penalized.metrics["val_loss"] == pytest.approx(plain.metrics["val_loss"], abs=1e-5)


def test_sparse_training_shrinks_scales(tmp_path: Path) -> None:
    """Far more of the sum over channels than training alone does."""
    plain, sparse = (
        float(slimming(train(config(penalties=penalties), root=tmp_path).model).detach()) for penalties in ({}, {"slimming": 0.1})
    )
    assert sparse < 0.9 * plain


def test_ranks_and_micro_steps_have_the_losses_of_one(tmp_path: Path) -> None:
    chosen = config(model__name="convnet", model__args={"widths": [8, 8], "groups": 4}, penalties={"group_lasso": 0.01})
    alone = train(chosen, root=tmp_path).run.history["loss"]
    for run in (
        train(chosen.override({"accumulate": 2}), root=tmp_path).run,
        launch(chosen, nproc=2, root=tmp_path).wait(timeout=120),
    ):
        np.testing.assert_allclose(run.history["loss"], alone, atol=1e-5)


def test_a_penalty_of_ones_own_is_kept_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def energy(model):\n    return sum(p.square().sum() for p in model.parameters())\n")
    run = train(config(penalties={f"{tmp_path}/mine.py:energy": 0.1}, epochs=1), root=tmp_path).run
    assert (run.path / "source" / "mine.py").is_file()


def test_a_penalty_with_nothing_to_act_upon_or_an_unknown_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="slimming shrinks the scales .* of which this Sequential has none"):
        train(config(model__name="mlp", model__args={}, penalties={"slimming": 0.1}), root=tmp_path)
    with pytest.raises(ConfigError, match=r"no penalty named 'sliming'. Did you mean 'slimming'"):
        config(penalties={"sliming": 0.1})
    with pytest.raises(ConfigError, match="penalties.l1=-1"):
        config(penalties={"l1": -1})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_penalty_is_computed_in_full_precision(precision: str, tmp_path: Path) -> None:
    """In bf16 the Gram matrices alone would be off by a percent."""
    mlp = {"model__name": "mlp", "model__args": {"widths": [16]}, "optim__lr": 1e-9, "epochs": 1, "precision": precision}
    plain, penalized = (train(config(penalties=penalties, **mlp), root=tmp_path) for penalties in ({}, {"orthogonal": 1.0}))
    added = penalized.run.history["loss"] - plain.run.history["loss"]
    np.testing.assert_allclose(added, float(orthogonal(plain.model).detach()), rtol=1e-5)
