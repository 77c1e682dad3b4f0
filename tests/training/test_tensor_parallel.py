"""Layers divided over ranks: which are, that they compute the same, and what is said where they can't."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench import Run, TrainConfig, launch, train
from workbench.errors import ConfigError, ModelError, RunError
from workbench.models import ModelConfig, build_model
from workbench.training.tensor_parallel import automatic_plan, divide

pytestmark = pytest.mark.usefixtures("forked")
NET = Path(__file__).with_name("net.py")
net = runpy.run_path(str(NET))
BERT = {
    "data": {"name": f"{NET}:words", "batch_size": 32},
    "model": {"name": "bert_small", "args": {"width": 32, "layers": 2, "heads": 4, "vocab_size": 100, "dropout": 0.0}},
    "clip": {"mode": "agc", "max_norm": 0.1},
}
VIT = {"data.augment": ("shift",), "model.name": f"{NET}:vit", "model.args": {"depth": 2}}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bert_small", {"columns": 4 * (3 + 1), "rows": 4 * 2}),  # query, key, value and one of the MLP; what takes them
        ("vit_tiny_patch16_224", {"heads": 12, "columns": 12, "rows": 12}),
        ("swin_tiny_patch4_window7_224", {"columns": 12, "rows": 12}),  # windows share a table between heads: these stay whole
        ("convnext_tiny", {"columns": 18, "rows": 18}),
        ("resnet18", {}),
    ],
)
def test_the_automatic_plan_knows_attention_and_mlps(name: str, layers: dict[str, int]) -> None:
    styles = list(automatic_plan(build_model(ModelConfig(name=name, num_classes=2))).values())
    assert {style: styles.count(style) for style in set(styles)} == layers


def run_on(nproc: int, config: TrainConfig, root: Path, **mesh: Any) -> Run:
    return launch(config.override({"mesh": mesh}), nproc=nproc, root=root).wait(timeout=180)


def furthest(one: Run, other: Run) -> float:
    assert len(one.history) == len(other.history)
    return float(np.abs(one.history["loss"] - other.history["loss"]).max())


def test_divided_copies_and_shards_learn_as_one_process(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    given = config(ema=0.9, **BERT)
    one = train(given, root=tmp_path).run
    run = run_on(4, given, tmp_path, tensor=2, shard=2)
    difference = furthest(one, run)
    print(f"tensor × shard: largest difference of {len(one.history)} losses {difference:.1e}")
    assert difference < 1e-5
    mine, its = (r.readings("gradients").query("rank == 0").sort_values(["step", "layer"], ignore_index=True) for r in (run, one))
    assert mine["layer"].tolist() == its["layer"].tolist()
    for column in ("norm", "max", "weight_norm"):
        np.testing.assert_allclose(mine[column], its[column], rtol=2e-3, atol=2e-5)


def test_a_checkpoint_of_divided_layers_opens_on_one_process(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    given = config(**VIT)
    one = train(given, root=tmp_path).run
    run = launch(given.override({"mesh.tensor": 2}), nproc=2, root=tmp_path, replay=[(11, "stop", {})]).wait(timeout=180)
    assert run.status == "stopped"
    assert furthest(one, run.resume(1, mesh={}).wait(timeout=180)) < 1e-5


def half_a_plan(model: nn.Module) -> dict[str, str]:
    return {"blocks.*.mlp.fc1": "columns"}


def test_a_plan_that_changes_what_is_computed_is_refused(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Divided by the plan .* over 2 ranks, VisionTransformer fails"):
        run_on(2, config(**VIT), tmp_path, tensor=2, plan=f"{__file__}:half_a_plan")


@pytest.mark.parametrize(
    ("name", "error"),
    [("vit", "132 units of an MLP don't divide by 5; 3 attention heads don't"), ("net", "no layer of Sequential")],
)
def test_what_cannot_be_divided_is_said(name: str, error: str) -> None:
    model = net["vit"](heads=3, width=33) if name == "vit" else net["net"]()
    with pytest.raises(ModelError, match=error):
        divide(model, "auto", SimpleNamespace(size=lambda: 5), torch.zeros(2, 1, 8, 8))


def no_such_layer(model: nn.Module) -> dict[str, str]:
    return {"blocks.*.mlp.fc3": "columns"}


def no_such_style(model: nn.Module) -> dict[str, str]:
    return {"blocks.*.mlp.fc1": "diagonals"}


def no_such_attention(model: nn.Module) -> dict[str, str]:
    return {"blocks.*.mlp": "heads"}


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (no_such_layer, "'blocks.*.mlp.fc3', which the model doesn't have"),
        (no_such_style, "the style 'diagonals'"),
        (no_such_attention, "takes 'blocks.0.mlp' by heads, and it is a Mlp"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(plan: Callable[..., Any], error: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(error)):
        divide(net["vit"](), f"{__file__}:{plan.__name__}", SimpleNamespace(size=lambda: 2), torch.zeros(2, 1, 8, 8))


def test_what_looks_at_whole_layers_is_refused(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no plan of tensor parallelism named 'alto'"):
        config(**VIT).override({"mesh.plan": "alto"})
