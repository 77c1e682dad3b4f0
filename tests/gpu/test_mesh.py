"""Divided layers and stages on two GPUs: the losses of one, compiled too, and checkpoints that open on the other mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import Run, TrainConfig, launch, train

pytestmark = pytest.mark.gpu(2)
NET = Path(__file__).resolve().parents[1] / "training" / "net.py"

MESHES: dict[str, dict[str, Any]] = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


@pytest.fixture(scope="module")
def given(config: Callable[..., TrainConfig]) -> TrainConfig:
    """A transformer, in micro-steps enough for two stages."""
    model = {"model": {"name": f"{NET}:vit"}, "channels_last": False, "deterministic": False}
    learning = {"optim__lr": 2e-3, "data__augment": None, "accumulate": 4, "ema": 0.9}
    return config(**model, **learning, probes={})


@pytest.fixture(scope="module")
def one(given: TrainConfig) -> Run:
    return train(given).run


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("changes", "tolerance"), [({}, 1e-4), ({"compile": "default"}, 1e-3), ({"precision": "bf16"}, 5e-2)])
def test_a_divided_model_has_the_losses_of_one_gpu(
    name: str, changes: dict[str, Any], tolerance: float, one: Run, given: TrainConfig, furthest: Callable[[Run, Run], float]
) -> None:
    run = launch(given.override({"mesh": MESHES[name], **changes}), nproc=2).wait(timeout=300)
    difference = furthest(one, run)
    print(f"{name}, {changes}: {difference:.1e}")
    assert difference < tolerance


def test_a_checkpoint_of_divided_layers_opens_in_stages(
    one: Run, tmp_path: Path, given: TrainConfig, furthest: Callable[[Run, Run], float]
) -> None:
    run = launch(given.override({"mesh": MESHES["tensor"]}), nproc=2, root=tmp_path, replay=[(11, "stop", {})])
    assert run.wait(timeout=300).status == "stopped"
    assert furthest(one, run.resume(2, mesh=MESHES["pipeline"]).wait(timeout=300)) < 1e-4
