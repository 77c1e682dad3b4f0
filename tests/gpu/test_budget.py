"""What readings cost on CUDA: told by the device's own clock, which nothing waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import TrainConfig, train
from workbench.events import ReadingsTimed
from workbench.probes import Probe, ProbeConfig, ProbeSet, StepContext
from workbench.training.budget import Budget, clock


class Products(Probe):
    """Multiplies matrices, as the step does, half as often."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(ProbeConfig())
        self.x = x

    def read(self, context: StepContext) -> Tensor | None:
        for _ in range(5):
            self.x @ self.x
        return None


def test_a_reading_is_timed_without_waiting_for_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    probes = ProbeSet({"products": (Products(x), 10)}, lambda *reading: None)
    said: list[ReadingsTimed] = []

    def post(name: str, **settings: Any) -> None:
        budget.apply(step, **settings)

    budget = Budget(probes, ["products"], 0.1, 100_000, 1000, clock(x.device), post, lambda event, reason: said.append(event))
    x @ x
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 121):
            budget.begin(step)
            for _ in range(10):
                x @ x
            probes.read(StepContext(step))
            probes.updated()
            budget.after()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    budget.after()
    assert said and 0.3 < said[-1].cost < 0.8


@pytest.mark.parametrize("compile", ["off", "reduce-overhead"])
def test_a_run_finds_its_interval(compile: str) -> None:
    config = TrainConfig(
        data={"name": "digits", "batch_size": 64, "augment": ()},
        model={"name": "resnet20"},
        epochs=45,
        eval_every=0,
        checkpoint={"every_epochs": 0},
        device="cuda",
        compile=compile,
        probes={"overhead": 0.05},
    )
    run = train(config).run
    last = [event for event in run.events if isinstance(event, ReadingsTimed)][-1]
    kinds = ("gradients", "activations", "memory", "communication")
    assert {run.resolved[f"probes.{kind}.every"]["value"] for kind in kinds} == {last.every}
    steps = run.readings("gradients")["step"]
    assert all(step % last.every == 0 for step in steps[steps > last.step])
    known = run.readings("communication")["idle"]
    assert known.dropna().between(0, 1).all() and known.notna().any()
    print(f"{compile}: {run.resolved['probes.gradients.every']['reason']}; idle {known.median():.2f}")
