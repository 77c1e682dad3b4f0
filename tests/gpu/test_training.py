"""Augmentation, mixing, averaging and distillation on CUDA: nothing waits for the device, captured steps learn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench import TrainConfig, save_model, train
from workbench.data.batches import Batches, Target
from workbench.data.config import AUGMENTATIONS, DataConfig
from workbench.data.order import Shard
from workbench.data.splits import Arrays, Splits
from workbench.models import ModelConfig, build_model
from workbench.training.average import WeightAverage


def images(count: int = 64) -> Splits:
    x = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Splits(Arrays(x, torch.arange(count) % 10), Arrays(x, torch.arange(count) % 10))


@pytest.mark.parametrize("shard", [Shard(), Shard(0, 2, 2)])
@pytest.mark.parametrize("mix", ["off", "mixup", "cutmix"])
def test_no_augmentation_or_mix_waits_for_the_device(mix: Any, shard: Shard) -> None:
    config = DataConfig(batch_size=32, augment=tuple(AUGMENTATIONS), mix=mix)
    batches = Batches(images(), config, shard, Target(torch.device("cuda"), torch.bfloat16, channels_last=True), 0)
    list(map(list, batches.epoch(0)))  # what is loaded once, is
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [part for step in batches.epoch(1) for part in step]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 2 * shard.micro and all(torch.isfinite(x).all() for x, _ in found)


def test_an_average_is_taken_without_waiting_for_the_device() -> None:
    model = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=3)).cuda()
    average = WeightAverage(model, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            average.update(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in model.named_parameters():
        torch.testing.assert_close(average.state[name], value.detach())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_captured_run_with_teacher_penalty_and_average_learns_as_the_eager_one(mode: str, tmp_path: Path) -> None:
    teacher = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 8}))
    save_model(teacher, tmp_path / "teacher")
    config = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 64},
        model={"name": "resnet20", "args": {"width": 4}},
        distill={
            "teacher": str(tmp_path / "teacher"),
            "terms": {"soft": 0.9, "features": 0.1, "attention": 2.0},
            "layers": ["stages.?"],
        },
        penalties={"slimming": 1e-3, "group_lasso": 1e-4},
        ema=0.9,
        epochs=3,
        device="cuda",
        precision="fp32",
    )
    eager, captured = (train(config.override({"compile": name}), root=tmp_path) for name in ("off", mode))
    np.testing.assert_allclose(captured.run.history["loss"], eager.run.history["loss"], rtol=1e-2)
    assert captured.metrics["val_loss"] == pytest.approx(eager.metrics["val_loss"], rel=2e-2)
