"""Who carries a run: one process at a time, told apart from others of its pid, ended with all it started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from workbench import Run, TrainConfig, launcher
from workbench.errors import RunError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(TrainConfig(), root=tmp_path)


def test_a_process_is_told_from_another_of_its_pid() -> None:
    here = launcher.Process.current()
    assert here.alive() is True
    assert launcher.Process(here.host, here.pid, here.started + 100).alive() is False
    assert launcher.Process("elsewhere", here.pid, here.started).alive() is None


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = launcher.Process.of(child.pid)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert process.alive() is False
    child.wait()


def test_an_attempt_is_carried_by_one_process(run: Run) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert launcher.claim(run.path, 2) == 1
        launcher.record(run.path, 1, 2, launcher.Process.of(child.pid))
        with pytest.raises(RunError, match=f"The process {child.pid} is at the run"):
            launcher.claim(run.path, 1)
        launcher.release(run.path, 1)
        assert launcher.at_work(run.path) is None
        assert launcher.claim(run.path, 1) == 2
        launcher.record(run.path, 2, 1, launcher.Process.of(child.pid))
    finally:
        child.kill()
        child.wait()
    assert launcher.claim(run.path, 1) == 3
    latest = launcher.Attempt.latest(run.path)
    assert latest is not None and latest.number == 3 and latest.nproc == 1


CLAIMER = (
    "import sys, time\nfrom pathlib import Path\nfrom workbench import launcher\n"
    "print(launcher.claim(Path(sys.argv[1]), 1), flush=True)\ntime.sleep(60)"
)


def test_of_many_that_claim_at_once_one_does(run: Run) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(run.path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(4)
    ]
    try:
        deadline = time.monotonic() + 60
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [path.name for path in (run.path / "attempts").glob("*.json")] == ["0001.json"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_an_attempt_file_that_is_torn_is_passed_over(run: Run) -> None:
    launcher.claim(run.path, 1)
    (run.path / "attempts" / "0002.json").write_text('{"numb')
    latest = launcher.Attempt.latest(run.path)
    assert latest is not None and latest.number == 1
    assert launcher.claim(run.path, 1) == 3


def test_a_process_is_ended_with_its_descendants_even_if_they_refuse() -> None:
    stubborn = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    inner = stubborn + "print('up', flush=True)\ntime.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", stubborn + f"subprocess.Popen([sys.executable, '-c', {inner!r}])\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) == 1
    launcher.terminate(launcher.Process.of(child.pid), grace=0.5)
    child.wait()
    assert not family[0].is_running() or family[0].status() == psutil.STATUS_ZOMBIE
    child.stdout.close()


def test_several_processes_or_one_that_may_start_again_have_a_supervisor(run: Run) -> None:
    assert launcher.command_line(run.path, 1, 2) == launcher.worker_command(run.path, 2)
    for options in ({"nproc": 4}, {"nproc": 1, "restarts": 3}):
        command = launcher.command_line(run.path, attempt=2, **options)
        assert command[1:3] == ["-m", "workbench.supervisor"] and f"--nproc={options['nproc']}" in command


def test_a_supervised_attempt_is_its_supervisors_until_that_has_said_how_it_ended(run: Run) -> None:
    number = launcher.claim(run.path, 2, supervisor=launcher.Process.current())
    launcher.release(run.path, number)  # rank 0 says that it is done
    assert launcher.at_work(run.path) == launcher.Process.current()
    assert run.status == "starting"
    launcher.release(run.path, number, "Rank 1 was killed.")
    assert run.status == "failed" and run.error == "Rank 1 was killed."
    assert launcher.claim(run.path, 2, supervisor=launcher.Process.current()) == 2  # its own


def test_a_run_that_a_rank_starts_is_none_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started = {}
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda *args, **options: started.update(options) or Child())
    monkeypatch.setattr(launcher, "_children", {})
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "WORKBENCH_SUPERVISOR", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "1")
    launcher.spawn(run.path, 1)
    assert started["env"]["NCCL_DEBUG"] == "1"
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "WORKBENCH_SUPERVISOR"} & started["env"].keys()


class Child:
    """This very process, in place of one that was started."""

    pid = os.getpid()

    def wait(self) -> None: ...


def test_the_tail_of_a_log(run: Run) -> None:
    assert launcher.tail(run.path, 1) == ""
    (run.path / "logs" / "attempt-0001.log").write_bytes(b"\n".join(b"line %d" % i for i in range(100)) + b"\xff\n")
    assert launcher.tail(run.path, 1, lines=2) == "line 98\nline 99\N{REPLACEMENT CHARACTER}"


def test_a_heartbeat_is_read_as_it_was_written(run: Run) -> None:
    assert launcher.Heartbeat.read(run.path) is None
    beat = launcher.Heartbeat(launcher.Process.current(), 1.5, 2, 30, 1.25)
    beat.write(run.path)
    assert launcher.Heartbeat.read(run.path) == beat
    assert os.listdir(run.path / "attempts") == []
