"""Whether a device waits for its host, from what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from workbench import TrainConfig, train
from workbench.data.batches import Batches, Target
from workbench.data.config import DataConfig
from workbench.data.order import Shard
from workbench.data.splits import load_splits
from workbench.training.clock import LOOKS, StepClock
from workbench.training.objective import Objective
from workbench.training.parallel import Parallel


def clock(device: str) -> StepClock:
    batches = Batches(load_splits(DataConfig(limit=64)), DataConfig(batch_size=32), Shard(), Target(torch.device("cpu")), 0)
    return StepClock(torch.device(device), batches, Parallel(Objective(nn.Linear(1, 1), nn.CrossEntropyLoss())))


def test_idleness_is_the_share_of_steps_that_find_the_last_one_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done = False

    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    steps = clock("cuda")
    steps.start()

    def run(count: int) -> float:
        for _ in range(count):
            steps.begin()
            steps.end()
        return steps.idle

    assert math.isnan(run(1))  # the first step follows none
    assert run(5) == 0
    done = True
    assert run(5) == 0.5
    steps.start()
    done = False
    assert run(1) == 0.5  # what comes after an evaluation says nothing
    assert run(LOOKS) == 0


def test_a_cpu_is_never_idle(config: Callable[..., TrainConfig]) -> None:
    off: dict[str, Any] = {f"probes.{name}.every": 0 for name in ("gradients", "activations")}
    times = train(config(epochs=1, **off, **{"probes.communication.every": 2})).run.readings("communication")
    assert times["busy"].notna().any() and times["idle"].isna().all()
