"""For every test of this folder: the devices that it needs, and the config that most runs start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench import Run, TrainConfig

NET = Path(__file__).resolve().parents[1] / "training" / "net.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them all, and skip what takes more devices than there are: ``@pytest.mark.gpu(2)`` takes two."""
    present = torch.cuda.device_count()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            needed = max([1, *(count for mark in item.iter_markers("gpu") for count in mark.args)])
            item.add_marker(pytest.mark.gpu)
            if present < needed:
                item.add_marker(pytest.mark.skip(reason=f"takes {needed} CUDA device(s), and there are {present}"))


def small(**changes: Any) -> TrainConfig:
    """Digits, a few steps, dropout and augmentation, repeatable; dotted settings by keyword with ``__`` for the dot."""
    base = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 32, "augment": ("shift", "flip", "cutout")},
        model={"name": f"{NET}:net"},
        optim={"name": "adamw", "lr": 5e-3},
        clip={"mode": "dynamic", "max_norm": 0.5},
        epochs=3,
        device="cuda",
        precision="fp32",
        deterministic=True,
        log_every=3,
        checkpoint={"every_epochs": 0},
        probes={"gradients": {"every": 4}, "activations": {"every": 4}, "memory": {"every": 4}},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="session")
def config() -> Callable[..., TrainConfig]:
    return small


@pytest.fixture(scope="session")
def furthest() -> Callable[[Run, Run], float]:
    """The largest difference of two runs' losses."""

    def between(one: Run, other: Run) -> float:
        assert len(one.history) == len(other.history)
        return float(np.abs(one.history["loss"] - other.history["loss"]).max())

    return between
