"""Distillation within compression: it recovers a pruned model, trains a quantized one, and both reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from workbench import PruneConfig, QuantConfig, TrainConfig, load_model, prune, quantize, save_model, train
from workbench.compress import QuantAwareTraining, distill
from workbench.data import load_batches

CONFIG = TrainConfig(
    data={"name": "digits", "batch_size": 64, "augment": ["shift"]},
    model={"name": "resnet20", "args": {"width": 8}},
    optim={"name": "sgd", "lr": 0.1},
    epochs=3,
    device="cpu",
    checkpoint={"every_epochs": 0},
)
DISTIL = CONFIG.override({"epochs": 1, "optim.lr": 0.02})


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        found = [(model(x).argmax(1) == y).double() for x, y in load_batches(CONFIG.data)]
    return float(torch.cat(found).mean())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return train(CONFIG, root=tmp_path_factory.mktemp("runs")).model


def test_a_pruned_model_recovers_from_its_teacher_layer_by_layer_and_reloads(teacher: nn.Module, tmp_path: Path) -> None:
    pruned = prune(teacher, PruneConfig(ratio=0.5))
    settings = {"terms": {"soft": 0.9, "features": 0.1, "attention": 5.0}, "layers": ["stages.?"]}
    result = distill(pruned, teacher, DISTIL.override({"distill": settings}), root=tmp_path)
    assert accuracy(result.model) > accuracy(pruned) + 0.2
    assert [record["kind"] for record in result.model.structure.transforms] == ["prune"]  # type: ignore[union-attr]
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(load_model(save_model(result.model, tmp_path / "model"))(x), result.model(x))


@pytest.mark.slow
def test_a_model_prepared_for_quantization_learns_from_a_teacher_and_becomes_int8(teacher: nn.Module, tmp_path: Path) -> None:
    batches: list[Any] = load_batches(CONFIG.data)
    prepared = QuantAwareTraining(teacher, QuantConfig(mode="qat"), batches[0][0][:2]).prepare()
    settings = {"terms": {"soft": 0.9, "features": 0.1}, "layers": ["stages.?"]}
    result = distill(prepared, teacher, DISTIL.override({"distill": settings}), root=tmp_path)
    int8 = quantize(result.model)
    assert accuracy(int8) > accuracy(teacher) - 0.05
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_model(save_model(int8, tmp_path / "int8"))(x), int8(x))
