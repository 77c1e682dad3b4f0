"""Divided layers and stages on two GPUs: the losses of one, compiled too, and checkpoints that open on the other mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench import Run, TrainConfig, launch, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices"),
]
NET = Path(__file__).resolve().parents[1] / "training" / "net.py"

GIVEN = TrainConfig(
    data={"name": "digits", "limit": 256, "batch_size": 32},
    model={"name": f"{NET}:vit"},
    optim={"name": "adamw", "lr": 2e-3},
    clip={"mode": "dynamic", "max_norm": 0.5},
    accumulate=4,
    ema=0.9,
    epochs=3,
    device="cuda",
    precision="fp32",
    channels_last=False,
    log_every=3,
    checkpoint={"every_epochs": 0},
)
MESHES: dict[str, dict[str, Any]] = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


@pytest.fixture(scope="module")
def one() -> Run:
    return train(GIVEN).run


def furthest(one: Run, other: Run) -> float:
    assert len(one.history) == len(other.history)
    return float(np.abs(one.history["loss"] - other.history["loss"]).max())


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("changes", "tolerance"), [({}, 1e-4), ({"compile": "default"}, 1e-3), ({"precision": "bf16"}, 5e-2)])
def test_a_divided_model_has_the_losses_of_one_gpu(name: str, changes: dict[str, Any], tolerance: float, one: Run) -> None:
    run = launch(GIVEN.override({"mesh": MESHES[name], **changes}), nproc=2).wait(timeout=300)
    difference = furthest(one, run)
    print(f"{name}, {changes}: {difference:.1e}")
    assert difference < tolerance


def test_a_checkpoint_of_divided_layers_opens_in_stages(one: Run, tmp_path: Path) -> None:
    run = launch(GIVEN.override({"mesh": MESHES["tensor"]}), nproc=2, root=tmp_path, replay=[(11, "stop", {})])
    assert run.wait(timeout=300).status == "stopped"
    assert furthest(one, run.resume(2, mesh=MESHES["pipeline"]).wait(timeout=300)) < 1e-4
