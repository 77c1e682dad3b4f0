"""Runs that several tests look at, and how to compare runs bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workbench import Run, TrainConfig

NET = Path(__file__).with_name("net.py")


def small(**changes: Any) -> TrainConfig:
    """Digits, a few steps, dropout and augmentation; dotted settings by keyword with ``__`` for the dot."""
    base = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 32, "augment": ("shift", "flip", "cutout")},
        model={"name": f"{NET}:net"},
        optim={"name": "adamw", "lr": 5e-3},
        clip={"mode": "dynamic", "max_norm": 0.5},
        epochs=3,
        device="cpu",
        log_every=3,
        checkpoint={"every_epochs": 0},
        probes={"gradients": {"every": 4}, "activations": {"every": 4}, "memory": {"every": 0}},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="session")
def config() -> Callable[..., TrainConfig]:
    return small


def told(run: Run) -> dict[str, Any]:
    """What a run says of its numbers, without its speed."""
    readings = {kind: run.readings(kind) for kind in ("gradients", "activations")}
    if "histogram" in readings["activations"]:
        readings["activations"]["histogram"] = readings["activations"]["histogram"].map(lambda counts: tuple(counts))
    return {"history": run.history.drop(columns="samples_per_s"), **readings}


def same(one: Run, other: Run, *, weights: bool = True) -> None:
    """Fail unless two runs tell the same numbers, bit for bit."""
    mine, theirs = told(one), told(other)
    for kind, frame in mine.items():
        pd.testing.assert_frame_equal(frame, theirs[kind], check_exact=True, obj=kind)
    if weights:
        assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    return same


def whole(run: Run) -> None:
    """Fail unless the steps told are 1, 2, 3 … and no reading is told twice."""
    steps = run.history["step"].tolist()
    assert steps == list(range(1, len(steps) + 1))
    for kind in ("gradients", "activations"):
        frame = run.readings(kind)
        if len(frame):
            assert not frame.duplicated(["step", "rank", "layer"]).any()


@pytest.fixture(scope="session")
def assert_whole() -> Callable[[Run], None]:
    return whole


def wait_until(condition: Callable[[], Any], seconds: float = 60, tick: float = 0.01) -> Any:
    """Wait for a condition; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(tick)
    return found


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_until
