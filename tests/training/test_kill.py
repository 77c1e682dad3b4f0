"""A run killed at any instant: its folder opens, and the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Nursery
from workbench import Run, TrainConfig, events, launch, launcher, train
from workbench.launcher import Attempt

KILLS = 20


@pytest.fixture(scope="module")
def uninterrupted(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config(epochs=60), root=tmp_path_factory.mktemp("uninterrupted")).run


def started(run: Run) -> bool:
    attempt = Attempt.latest(run.path)
    return attempt is not None and any(isinstance(e, events.AttemptStarted) and e.attempt == attempt.number for e in run.events)


def kill(run: Run) -> None:
    """SIGKILL the worker, and wait until it is gone."""
    attempt = Attempt.latest(run.path)
    assert attempt is not None
    with suppress(ProcessLookupError):  # it ended by itself
        os.kill(attempt.process.pid, signal.SIGKILL)
    while attempt.process.alive():
        time.sleep(0.005)


def saving(run: Run) -> set[int]:
    """Checkpoints begun and not complete, by inode: one left by an earlier kill stays until its step is saved again."""
    found = set()
    for path in (run.path / "checkpoints").glob("*.tmp"):
        with suppress(FileNotFoundError):  # complete by now
            found.add(path.stat().st_ino)
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_twenty_kills_in_a_row_change_no_bit(
    config: Callable[..., TrainConfig],
    uninterrupted: Run,
    assert_same: Callable[..., None],
    assert_whole: Callable[[Run], None],
    until: Callable[..., Any],
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Half of them at random instants, half within the saving of a checkpoint, which is due every fifth step.

    The processes are forks: how a process imports the engine, twenty times over, is not in question.
    """
    monkeypatch.setattr(launcher, "subprocess", nursery)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    run = launch(config(epochs=60, checkpoint__every_steps=5, model__args={"pause": 0.01}), root=tmp_path)
    torn, killed, reached = 0, 0, 0
    left: set[int] = set()
    for number in range(KILLS):
        until(lambda: started(run))
        if number % 2:
            until(lambda: saving(run) - left or run.status == "finished", tick=0.0005)  # noqa: B023
            time.sleep(draw.uniform(0, 0.006))
        else:
            time.sleep(draw.uniform(0, 0.8))
        kill(run)
        if run.status == "finished":
            break
        killed += 1
        torn += bool(saving(run) - left)
        left = saving(run)
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


def test_a_run_killed_while_it_starts_and_after_its_last_step_is_finished_by_resuming(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], until: Callable[..., Any], tmp_path: Path
) -> None:
    whole = train(config(epochs=1), root=tmp_path).run
    run = launch(config(epochs=1, model__args={"pause": 0.02}), root=tmp_path)
    kill(run)  # before a word
    assert run.status in ("failed", "lost") and run.history.empty
    assert "ended before it could start" in (run.error or "ended before it could start")
    run.resume()
    until(lambda: (run.path / "checkpoints" / "step-8").exists(), tick=0.0005)  # all is trained; the model is not saved
    kill(run)
    if run.status != "finished":
        assert run.status == "lost"
        run.resume()
    run.wait(timeout=120)
    assert_same(run, whole)
