"""A rank is killed in the middle of a step, or the parent of all: what the others do, what is said of it, what is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.forked import Nursery
from tests.processes import ranks
from workbench import Run, TrainConfig, launch, launcher
from workbench.events import AttemptStarted
from workbench.storage import Journal
from workbench.supervisor import PERMANENT, UNFIT, out_of_memory_kills, remaining

LIMIT = 30.0
"""Seconds in which the others must have ended; `make bench` tells how soon all train again."""


@pytest.fixture(scope="module")
def slow(config: Callable[..., TrainConfig]) -> TrainConfig:
    """24 steps of a tenth of a second, with dropout and a checkpoint every third."""
    return config(checkpoint__every_steps=3, checkpoint__keep=20, model__args={"pause": 0.1}, log_every=1)


@pytest.fixture(scope="module")
def undisturbed(slow: TrainConfig, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the others are compared to: by forks, since it is not its processes that count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "subprocess", nursery)
        return launch(slow.override({"model.args": {}}), nproc=2, root=tmp_path_factory.mktemp("undisturbed")).wait(timeout=120)


def stepped(run: Run, steps: int, attempt: int = 1) -> Callable[[], bool]:
    """Whether the attempt has done so many steps of its own."""

    def look() -> bool:
        said = [event for event in run.events if event.attempt == attempt]
        return len(said) > 0 and any(event.type == "steps" and event.step >= said[0].step + steps for event in said)

    return look


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_whoever_of_a_run_is_killed_it_ends_or_starts_again_and_loses_nothing(
    slow: TrainConfig,
    undisturbed: Run,
    assert_same: Callable[..., None],
    assert_whole: Callable[[Run], None],
    until: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run = launch(slow, nproc=2, restarts=1, root=tmp_path)
    until(stepped(run, 5), 120)
    first = ranks(run)
    begun = time.monotonic()
    first[1].kill()
    until(stepped(run, 1, attempt=2), 120)
    print(f"rank 1 killed: the next attempt's first step after {time.monotonic() - begun:.1f} s")
    assert run.status == "running" and gone(list(first.values()))
    (finding,) = run.findings
    assert f"Rank 1 (process {first[1].pid}) was killed by SIGKILL after step" in finding.message
    assert f"went on from step {finding.step}, on 2 rank(s)" in finding.message

    # No restart is left: the others stop.
    until(stepped(run, 4, attempt=2), 120)
    second = ranks(run)
    begun = time.monotonic()
    second[0].kill()
    run.wait(timeout=LIMIT, check=False)
    print(f"rank 0 killed: the other had ended after {time.monotonic() - begun:.1f} s")
    assert run.status == "failed" and gone(list(second.values()))
    assert f"Rank 0 (process {second[0].pid}) was killed by SIGKILL after step" in (run.error or "")

    # The parent of all: nobody is left to say a word.
    run.resume(restarts=1)
    until(stepped(run, 2, attempt=3), 120)
    third, attempt = ranks(run), launcher.Attempt.latest(run.path)
    assert attempt is not None
    begun = time.monotonic()
    os.kill(attempt.process.pid, signal.SIGKILL)
    until(lambda: gone(list(third.values())), LIMIT)
    print(f"the supervisor killed: its ranks had ended after {time.monotonic() - begun:.1f} s")
    assert run.status == "lost"

    fourth = run.resume() and until(lambda: len(ranks(run)) == 2 and ranks(run), 60)
    run.wait(timeout=120)
    until(lambda: gone(list(fourth.values())), LIMIT)
    starts = [event.step for event in run.events if event.type == "attempt_started"]
    assert len(starts) == 4 and starts[0] == 0 and 3 <= starts[1] < starts[2] <= starts[3]
    assert_whole(run)
    assert_same(run, undisturbed)


def test_an_error_that_would_come_again_is_not_tried_again(slow: TrainConfig, tmp_path: Path) -> None:
    run = launch(slow.override({"accumulate": 3}), restarts=3, root=tmp_path).wait(timeout=60, check=False)
    assert run.status == "failed" and "does not divide into 1 rank(s) × accumulate=3" in (run.error or "")
    assert len(list((run.path / "attempts").iterdir())) == 1


UNFIT_PLACE = """
import os, sys
sys.path.insert(0, {folder!r})
import net as nets
from workbench.errors import DeviceError

def net(num_classes=10, in_channels=1):
    if os.environ.get("LOCAL_RANK") == "0":
        raise DeviceError("The accelerator 0 fell off the bus.")
    return nets.net(num_classes, in_channels, dropout=0.0)
"""


def test_ranks_go_on_without_the_one_whose_accelerator_is_gone(slow: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "unfit.py").write_text(UNFIT_PLACE.format(folder=str(Path(__file__).parent)))
    config = slow.override({"model": {"name": f"{tmp_path / 'unfit.py'}:net"}, "max_steps": 4})
    run = launch(config, nproc=2, restarts=1, min_nproc=1, root=tmp_path).wait(timeout=120)
    begun = [event for event in run.events if event.type == "attempt_started"]
    assert [event.world_size for event in begun] == [1]
    assert "The accelerator 0 fell off the bus" in run.findings[0].message and "on 1 rank(s)" in run.findings[0].message


def beat(run: Run, attempt: int, step: int) -> None:
    launcher.Heartbeat(launcher.Process.current(), time.time(), attempt, step, time.time()).write(run.path)


@pytest.mark.parametrize(
    ("bad", "step", "fewest", "left"),
    [
        ({1: -9}, 8, 4, [0, 1, 2, 3]),  # died at work: all start again
        ({1: -9}, 0, 4, [0, 1, 2, 3]),
        ({1: -9}, 8, 1, [0, 1, 2, 3]),
        ({1: -9}, 0, 2, [0, 2]),  # died before a step: 3 ranks don't divide the batch of 32
        ({2: UNFIT}, 8, 1, [0, 1]),
        ({2: UNFIT}, 8, 3, []),
        ({1: PERMANENT}, 8, 1, []),
        ({0: 1}, 8, 4, [0, 1, 2, 3]),
    ],
)
def test_who_starts_again(
    bad: dict[int, int], step: int, fewest: int, left: list[int], slow: TrainConfig, tmp_path: Path
) -> None:
    run = Run.create(slow, root=tmp_path)
    journal = Journal(run.path / "events" / "rank-00000.jsonl")
    begun = AttemptStarted(attempt=1, total_steps=24, steps_per_epoch=8, world_size=4, device="cpu", parameters=1)
    journal.append(begun.model_dump_json())
    journal.close()
    beat(run, 1, step)
    assert remaining(run, 1, [0, 1, 2, 3], bad, fewest) == left


@pytest.mark.parametrize(
    ("file", "text", "group"),
    [
        ("sys/fs/cgroup/jobs/7/memory.events", "low 0\noom 4\noom_kill 3\n", "0::/jobs/7"),
        ("sys/fs/cgroup/memory/jobs/7/memory.oom_control", "under_oom 0\noom_kill 3\n", "4:memory:/jobs/7"),
        ("proc/vmstat", "nr_free_pages 5\noom_kill 3\n", "0::/"),
    ],
)
def test_the_out_of_memory_killer_is_told_from_others(file: str, text: str, group: str, tmp_path: Path) -> None:
    assert out_of_memory_kills(tmp_path) is None
    for path, content in ((file, text), ("proc/self/cgroup", group)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert out_of_memory_kills(tmp_path) == 3
