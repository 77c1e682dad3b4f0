"""Copies and shards of a model over processes: the losses of one process, and checkpoints that open on any other mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from workbench import Run, TrainConfig, launch, load_model, train
from workbench.errors import ConfigError
from workbench.models import ModelConfig, build_model
from workbench.training.blocks import blocks_of
from workbench.training.config import MeshConfig

pytestmark = pytest.mark.usefixtures("forked")

TOLERANCE = 1e-5
"""Of losses near 2: gradients are summed in another order."""

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 copies": (2, {}),
    "2 shards": (2, {"shard": "all"}),
    "2 copies of 2 shards": (4, {"replicate": 2, "shard": 2}),
}


@pytest.fixture(scope="module")
def given(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        return config(
            **(
                {"model.args": {"dropout": 0.0}, "epochs": 3, "ema": 0.9, "penalties": {"l1": 1e-4}, "checkpoint.every_steps": 10}
                | changes
            )
        )

    return make


@pytest.fixture(scope="module")
def alone(given: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(given(), root=tmp_path_factory.mktemp("alone")).run


@pytest.fixture(scope="module")
def on(given: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run on a mesh by name, made once."""
    made: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in made:
            nproc, mesh = MESHES[name]
            made[name] = launch(given(mesh=mesh), nproc=nproc, root=tmp_path_factory.mktemp("mesh")).wait(timeout=180)
        return made[name]

    return run


def furthest(one: Run, other: Run, column: str = "loss") -> float:
    assert one.history["step"].tolist() == other.history["step"].tolist()
    return float(np.nanmax(np.abs(one.history[column] - other.history[column])))


def told(readings: pd.DataFrame, rank: int) -> pd.DataFrame:
    """What one rank read of the gradients."""
    mine = readings[readings["rank"] == rank].drop(columns="rank")
    return mine.sort_values(["step", "layer"], ignore_index=True)


@pytest.mark.parametrize("name", ["2 shards", "2 copies of 2 shards"])
def test_a_mesh_has_the_losses_readings_and_weights_of_one_process(name: str, alone: Run, on: Callable[[str], Run]) -> None:
    run = on(name)
    difference = furthest(alone, run)
    print(f"{name}: largest difference of {len(alone.history)} losses {difference:.1e}")
    assert difference < TOLERANCE
    assert furthest(alone, run, "val_loss") < TOLERANCE
    readings = run.readings("gradients")
    for rank in range(MESHES[name][0]):
        pd.testing.assert_frame_equal(told(readings, rank), told(alone.readings("gradients"), 0), rtol=2e-3, atol=1e-5)
    mine, its = (load_file(r.path / "model.safetensors") for r in (run, alone))
    assert mine.keys() == its.keys()
    for key, value in its.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4)
    load_model(run.path)(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(("before", "after"), [("2 copies", "2 shards"), ("2 shards", "one")])
def test_a_checkpoint_opens_on_another_mesh(
    before: str, after: str, alone: Run, given: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    nproc, mesh = MESHES[before]
    run = launch(given(mesh=mesh), nproc=nproc, root=tmp_path, replay=[(11, "stop", {})]).wait(timeout=180)
    assert run.status == "stopped"
    nproc, mesh = MESHES.get(after, (1, {}))
    run.resume(nproc, mesh=mesh).wait(timeout=180)
    assert furthest(alone, run) < TOLERANCE


def test_a_mesh_that_does_not_fit_says_which_number_would(given: Callable[..., TrainConfig], tmp_path: Path) -> None:
    for settings, ranks, sizes in (
        ({"shard": "all"}, 4, (1, 1, 4, 1)),
        ({"shard": 2}, 8, (1, 4, 2, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"pipeline": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"replicate": 2, "tensor": "all"}, 8, (1, 2, 1, 4)),
    ):
        assert tuple(MeshConfig(**settings).arranged(ranks).values()) == sizes
    with pytest.raises(ConfigError, match=r"replicate=2 × shard=2 takes 4 ranks, and there are 3. Launch with nproc=4"):
        MeshConfig(replicate=2, shard=2).arranged(3)
    with pytest.raises(ConfigError, match="there are 2"):
        launch(given(mesh={"shard": 4}), nproc=2, root=tmp_path)
    with pytest.raises(ConfigError, match="there are 1"):
        train(given(mesh={"shard": 2}), root=tmp_path)


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 8), ("vit_tiny_patch16_224", 12), ("convnext_tiny", 18), ("bert_small", 4), ("lstm", 0)]
)
def test_blocks_are_the_repeated_parts_of_a_model(name: str, blocks: int) -> None:
    model = build_model(ModelConfig(name=name, num_classes=2))
    found = blocks_of(model)
    assert len(found) == blocks
    inside = [id(parameter) for block in found for parameter in block.parameters()]
    assert len(inside) == len(set(inside))  # no block within another
