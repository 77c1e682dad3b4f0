"""A run folder read at any time: by what its journal says, while it is written, in whatever state it was left."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import Run, TrainConfig, events, launcher
from workbench.errors import RunError, WorkbenchError
from workbench.run import KINDS, runs_folder
from workbench.storage import Journal, SegmentWriter, write_atomic


class Author:
    """Writes a run folder as a trainer would."""

    def __init__(self, root: Path) -> None:
        self.run = Run.create(TrainConfig(), root=root)
        self.journal = Journal(self.run.path / "events" / "rank-00000.jsonl")
        self.attempt = 0

    def start(self, step: int = 0, total: int = 100) -> None:
        self.attempt += 1
        launcher.record(self.run.path, self.attempt, 1, launcher.Process.current())
        self.say(
            events.AttemptStarted(step=step, total_steps=total, steps_per_epoch=10, world_size=1, device="cpu", parameters=1)
        )

    def say(self, event: Any) -> None:
        self.journal.append(event.model_copy(update={"attempt": self.attempt}).model_dump_json())

    def steps(self, first: int, last: int) -> None:
        numbers = list(range(first, last + 1))
        losses = [float(self.attempt * 1000 + number) for number in numbers]
        rates = [0.1] * len(numbers)
        self.say(events.Steps(step=last, first=first, loss=losses, lr=rates, epoch=1, samples_per_s=1.0, time=1000.0 + last))
        for number in numbers:
            SegmentWriter(self.run.path / "readings", self.attempt, 0).write(
                "gradients", pa.table({"step": [number], "layer": ["a"]}), number
            )


@pytest.fixture
def author(tmp_path: Path) -> Author:
    return Author(tmp_path)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_after_any_restarts_each_step_counts_once_and_the_later_attempt_wins(data: st.DataObject, tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("restarts")
    author = Author(root)
    follower = Run.open(author.run.path)
    truth: dict[int, float] = {}
    reached, saved = 0, [0]
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.sampled_from(saved))
        author.start(start)
        truth = {step: loss for step, loss in truth.items() if step <= start}
        reached, saved = start, [step for step in saved if step <= start]
        for _ in range(data.draw(st.integers(0, 3))):
            last = reached + data.draw(st.integers(1, 4))
            author.steps(reached + 1, last)
            truth |= {step: author.attempt * 1000.0 + step for step in range(reached + 1, last + 1)}
            reached = last
            saved.append(last)  # a checkpoint ends a window
        _ = follower.history, follower.readings("gradients")  # a reader may look at any time
    for run in (Run.open(author.run.path), follower):
        assert dict(zip(run.history["step"].tolist(), run.history["loss"].tolist(), strict=True)) == truth
        assert run.readings("gradients")["step"].tolist() == sorted(truth)
        assert run.progress.step == reached
    shutil.rmtree(root)


def test_kinds_of_events_that_only_a_newer_workbench_knows_are_passed_over(author: Author) -> None:
    author.start()
    author.journal.append(json.dumps({"type": "teleported", "time": 1.0, "attempt": 1, "step": 1, "where": "elsewhere"}))
    author.steps(1, 3)
    assert [event.type for event in author.run.events] == ["attempt_started", "steps"]
    assert author.run.history["step"].tolist() == [1, 2, 3]


def test_a_line_that_is_no_event_is_told_each_time(author: Author) -> None:
    author.start()
    author.journal.append('{"type": "steps", "first": "never"}')
    for _ in range(2):  # not only to the reader that comes first
        with pytest.raises(WorkbenchError, match="holds a line that is not an event"):
            author.run.history  # noqa: B018


def test_an_evaluation_that_gave_no_number_is_read_back(author: Author) -> None:
    author.start()
    author.steps(1, 2)
    author.say(events.Evaluated(step=2, epoch=1, metrics={"val_loss": float("nan"), "worst": float("inf"), "accuracy": 0.1}))
    found = Run.open(author.run.path).metrics
    assert found["val_loss"] != found["val_loss"] and found["worst"] == float("inf") and found["accuracy"] == 0.1


def test_status_says_how_a_run_stands(author: Author) -> None:
    run = author.run
    assert run.status == "created" and run.history.empty and run.metrics == {} and run.error is None and run.checkpoints == []
    launcher.claim(run.path, 1)
    assert run.status == "starting"
    author.start()
    assert run.status == "running"
    author.say(events.Paused(step=3))
    assert run.status == "paused"
    author.say(events.Resumed(step=3))
    assert run.status == "running"
    author.say(events.Stopped(step=4))
    assert run.status == "stopped"
    author.start(step=4)
    assert run.status == "running"
    author.say(events.Failed(step=5, error="KeyError", message="KeyError: 'x'"))
    assert run.status == "failed" and run.error == "KeyError: 'x'"
    author.start(step=4)
    author.say(events.Finished(step=9, metrics={"accuracy": 0.5}))
    assert run.status == "finished" and run.error is None


def test_the_first_rank_to_fail_says_why(author: Author) -> None:
    author.start()
    author.say(events.Failed(error="RuntimeError", message="Connection closed by peer", time=20.0))
    other = Journal(author.run.path / "events" / "rank-00001.jsonl")
    other.append(events.Failed(attempt=1, error="DataError", message="Sample 3 cannot be read", time=10.0).model_dump_json())
    assert author.run.error == "Sample 3 cannot be read"


def gone() -> launcher.Process:
    here = launcher.Process.current()
    return launcher.Process(here.host, here.pid, here.started - 1000)  # this pid, but another process's


def test_a_run_whose_process_is_gone_is_lost(author: Author) -> None:
    author.start()
    launcher.record(author.run.path, 1, 1, gone())
    assert author.run.status == "lost"


def test_a_run_on_another_host_is_known_by_its_heartbeat(author: Author) -> None:
    elsewhere = launcher.Process("elsewhere", 1, 0.0)
    author.start()
    launcher.record(author.run.path, 1, 1, elsewhere)
    launcher.Heartbeat(elsewhere, time.time(), 1, 3, time.time()).write(author.run.path)
    assert author.run.status == "running"
    launcher.Heartbeat(elsewhere, time.time() - 60, 1, 3, time.time() - 60).write(author.run.path)
    assert author.run.status == "lost"
    with pytest.raises(RunError, match="belong to the host elsewhere"):
        author.run.kill()


def test_a_run_that_lives_without_stepping_is_hung(author: Author) -> None:
    author.start()
    for step in range(1, 9):
        author.steps(step, step)
    now = time.time()
    launcher.Heartbeat(launcher.Process.current(), now, 1, 8, now - 100).write(author.run.path)
    assert author.run.status == "running"
    launcher.Heartbeat(launcher.Process.current(), now, 1, 8, now - 130).write(author.run.path)
    assert author.run.status == "hung"


def test_a_run_opens_by_path_by_name_and_by_the_start_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    run = Run.create(TrainConfig(), label="my run: a/b")
    assert run.path.parent == runs_folder() and "my-run--a-b" in run.id
    for name in (run.path, str(run.path), run.id, run.id[:-1]):
        assert Run.open(name).path == run.path
    other = Run.create(TrainConfig(), label="my run: a/b")
    assert [found.id for found in Run.all()] == [other.id, run.id]  # newest first
    with pytest.raises(RunError, match="There is no run 'elsewhere'.*Runs lie under"):
        Run.open("elsewhere")
    with pytest.raises(RunError, match="2 runs start so"):
        Run.open(run.id[:10])


def test_a_run_folder_is_its_owners_alone(author: Author) -> None:
    assert author.run.path.stat().st_mode & 0o077 == 0


def test_opening_a_run_imports_no_name_from_its_folder(author: Author) -> None:
    write_atomic(author.run.path / "config.yaml", "kind: os:system\n")
    with pytest.raises(RunError, match="unknown kind 'os:system'"):
        author.run.config  # noqa: B018
    assert set(KINDS) == {"train"} or "train" in KINDS


def test_waiting_ends_with_the_run_or_the_patience(author: Author) -> None:
    author.start()
    with pytest.raises(RunError, match="is still running after 0.2 s"):
        author.run.wait(timeout=0.2)
    threading.Timer(0.3, lambda: author.say(events.Finished(step=1, metrics={}))).start()
    assert author.run.wait(timeout=20).status == "finished"


def test_a_lost_run_is_an_error_to_who_waits_for_it(author: Author) -> None:
    author.start()
    launcher.record(author.run.path, 1, 1, gone())
    with pytest.raises(RunError, match=r"are gone.*resume\(\) goes on from its last checkpoint"):
        author.run.wait()
    assert author.run.wait(check=False).status == "lost"


def test_readings_of_a_kind_that_nobody_took(author: Author) -> None:
    assert author.run.readings("gradients").empty
    author.start()
    author.steps(1, 1)
    assert author.run.readings("activations").empty
    with pytest.raises(RunError, match="no readings named 'weights'.*It has: gradients"):
        author.run.readings("weights")


def test_unfinished_checkpoints_do_not_count(author: Author) -> None:
    for name in ("step-9", "step-10", "step-11.tmp", "step-10.replaced.tmp"):
        (author.run.path / "checkpoints" / name).mkdir()
    assert [path.name for path in author.run.checkpoints] == ["step-9", "step-10"]


def test_a_model_that_is_not_there_yet(author: Author) -> None:
    with pytest.raises(RunError, match="has no model yet.*status: created"):
        author.run.load_model()


def test_one_reader_serves_many_threads(author: Author) -> None:
    author.start()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(30):
                steps = author.run.history["step"].tolist()
                assert steps == list(range(1, len(steps) + 1))
                author.run.readings("gradients")
                assert author.run.status == "running"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(1, 60):
        author.steps(step, step)
    for thread in threads:
        thread.join()
    assert not failures and len(author.run.history) == 59


def test_a_folder_that_is_copied_while_written_opens(author: Author, tmp_path: Path) -> None:
    author.start()
    author.steps(1, 5)
    content = (author.run.path / "events" / "rank-00000.jsonl").read_bytes()
    shutil.copytree(author.run.path, tmp_path / "copy")
    (tmp_path / "copy" / "events" / "rank-00000.jsonl").write_bytes(content[:-7])
    assert Run.open(tmp_path / "copy").history.empty
    assert os.path.samefile(Run.open(author.run.path).path, author.run.path)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("set", {"rate": 1.0}, "'rate' cannot be changed while training"),
        ("set", {"lr": -1.0}, "lr=-1.0 must be a finite number"),
        ("snapshot", {"steps": 51}, "steps=51 must lie between 1 and 50"),
        ("stop", {"steps": 2}, "'stop' takes no settings, and steps was given"),
        ("go", {}, "There is no command 'go'"),
    ],
)
def test_a_command_that_no_trainer_obeys_is_refused_where_it_is_given(
    name: str, settings: dict[str, float], words: str, tmp_path: Path
) -> None:
    run = Run.create(TrainConfig(), root=tmp_path)
    with pytest.raises(RunError, match=words):
        run.command(name, **settings)
