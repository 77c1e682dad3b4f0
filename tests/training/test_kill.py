"""A run killed at any instant: its folder opens, and the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import Run, TrainConfig, events, launch, train
from workbench.launcher import Attempt

KILLS = 20


@pytest.fixture(scope="module")
def uninterrupted(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config(epochs=60), root=tmp_path_factory.mktemp("uninterrupted")).run


def started(run: Run) -> bool:
    attempt = Attempt.latest(run.path)
    return attempt is not None and any(isinstance(e, events.AttemptStarted) and e.attempt == attempt.number for e in run.events)


def until(condition: Callable[[], Any], seconds: float = 60, tick: float = 0.01) -> Any:
    """Wait for a condition; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(tick)
    return found


def kill(run: Run) -> None:
    """SIGKILL the worker, and wait until it is gone."""
    attempt = Attempt.latest(run.path)
    assert attempt is not None
    os.kill(attempt.process.pid, signal.SIGKILL)
    until(lambda: not attempt.process.alive())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_twenty_kills_in_a_row_change_no_bit(
    config: Callable[..., TrainConfig],
    uninterrupted: Run,
    assert_same: Callable[..., None],
    assert_whole: Callable[[Run], None],
    tmp_path: Path,
) -> None:
    """Half of them at random instants, half within the saving of a checkpoint, which is due every fifth step."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    run = launch(config(epochs=60, checkpoint__every_steps=5, model__args={"pause": 0.01}), root=tmp_path)
    torn, killed, reached = 0, 0, 0
    for number in range(KILLS):
        until(lambda: started(run))
        if number % 2:
            checkpoints = run.path / "checkpoints"
            until(lambda: any(checkpoints.glob("*.tmp")) or run.status == "finished", tick=0.0005)
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 0.8))
        if run.status == "finished":
            break
        kill(run)
        killed += 1
        torn += any((run.path / "checkpoints").glob("*.tmp"))
        opened = Run.open(run.path)
        assert opened.status == "lost"
        assert_whole(opened)
        assert run.history.equals(opened.history)  # a reader that followed along sees what a new one sees
        assert len(opened.history) >= reached
        reached = int(opened.checkpoints[-1].name.removeprefix("step-")) if opened.checkpoints else 0
        run.resume(nproc=1)
    run.wait(timeout=120)
    print(f"killed {killed} times, {torn} times within a save; {len(run.history)} steps")
    assert killed == KILLS and torn >= 3
    assert_whole(run)
    assert_same(run, uninterrupted)
