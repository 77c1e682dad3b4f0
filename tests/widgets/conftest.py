"""Run folders written by hand: what a trainer would have said, without training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench import events, launcher
from workbench.run import Run
from workbench.storage import Journal
from workbench.training.config import TrainConfig


class FakeRun:
    """A run whose trainer is the test."""

    def __init__(self, config: TrainConfig, total: int = 100) -> None:
        self.run = Run.create(config, label=config.title)
        self.attempt = 0
        self.total = total
        self._journal = Journal(self.run.path / "events" / "rank-00000.jsonl")

    def start(self, step: int = 0) -> FakeRun:
        self.attempt = launcher.claim(self.run.path, 1)
        self.say(
            events.AttemptStarted(
                step=step, total_steps=self.total, steps_per_epoch=10, world_size=1, device="cpu", parameters=1000
            )
        )
        return self

    def say(self, event: Any) -> None:
        self._journal.append(event.model_copy(update={"attempt": self.attempt}).model_dump_json())

    def steps(self, first: int, last: int, evaluate: bool = True) -> FakeRun:
        losses = [2.3 * math.exp(-step / 50) for step in range(first, last + 1)]
        self.say(
            events.Steps(step=last, first=first, loss=losses, lr=[0.1] * len(losses), epoch=1 + last // 10, samples_per_s=1000.0)
        )
        if evaluate:
            self.say(
                events.Evaluated(step=last, epoch=last // 10, metrics={"loss": losses[-1], "accuracy": 1 - losses[-1] / 2.4})
            )
        return self

    def end(self, status: str = "finished") -> Run:
        made = {
            "finished": events.Finished(step=self.total, metrics={"accuracy": 0.9}),
            "stopped": events.Stopped(step=self.total),
            "failed": events.Failed(
                error="NonFiniteLoss", message="The loss became NaN at step 7.", traceback="Traceback: deep inside"
            ),
        }
        self.say(made[status])
        return self.run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def fake_run(runs: Path) -> Callable[..., FakeRun]:
    def make(config: TrainConfig | None = None, **settings: Any) -> FakeRun:
        return FakeRun(config or TrainConfig(), **settings)

    return make


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if a page were looking: panels open widgets."""
    from ipywidgets.widgets.widget import _instances

    monkeypatch.setenv("WORKBENCH_STATIC", "0")
    before = set(_instances)
    yield
    # plotly.js is given to pages by one widget a kernel, which stays
    left = [type(w).__name__ for key, w in _instances.items() if key not in before]
    assert left in ([], ["Layout", "PlotlyLoader"]), f"left open: {left}"


@pytest.fixture
def until() -> Callable[..., Any]:
    """Waits until a condition holds, and gives its value."""
    return _until


def _until(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")
