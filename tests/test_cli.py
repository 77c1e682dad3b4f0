"""The command line: quick to start, honest exit codes, errors in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import events
from workbench.cli import COMMANDS, main
from workbench.run import Run

TINY = ["--set", "model.name=mlp", "--set", "epochs=1", "--set", "max_steps=3", "--set", "data.limit=256"]


def test_help_is_quick_and_imports_no_framework() -> None:
    code = "import sys, workbench.cli\nprint([m for m in ('torch', 'pandas', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    begun = os.times()
    shown = subprocess.run([sys.executable, "-m", "workbench.cli", "--help"], capture_output=True, text=True, check=True).stdout
    spent = os.times().children_user - begun.children_user
    assert spent < 1.0, f"workbench --help took {spent:.2f} s of processor time"
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--set", "optim.lrr=1"], 2, "did you mean 'lr'"),
        (["train", "--set", "optim.lr"], 2, "has no '='"),
        (["train", "--config", "absent.yaml"], 2, "absent.yaml"),
        (["show", "absent"], 1, "There is no run 'absent'"),
        (["stop", "absent"], 1, "There is no run 'absent'"),
        (["pipeline", "absent.yaml"], 2, "absent.yaml"),
    ],
)
def test_an_error_is_one_line_with_its_code(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.splitlines()) == 1
    assert "Traceback" not in said.err


def test_log_level_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORKBENCH_LOG_LEVEL", "loud")
    assert main(["runs"]) == 2
    assert "WORKBENCH_LOG_LEVEL" in capsys.readouterr().err
    monkeypatch.setenv("WORKBENCH_LOG_LEVEL", "DEBUG")
    assert main(["show", "absent"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_train_then_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {name: digits}\nlabel: from-a-file\n")
    assert main(["train", "--config", str(file), *TINY]) == 0
    shown = capsys.readouterr().out
    (run,) = Run.all()
    assert run.status == "finished"
    assert str(run.path) in shown
    assert "accuracy" in shown

    assert main(["runs", "--filter", "from-a-file", "--filter", "status=finished"]) == 0
    assert run.id in capsys.readouterr().out
    assert main(["runs", "--filter", "status=running"]) == 0
    assert run.id not in capsys.readouterr().out
    assert main(["show", run.id]) == 0
    assert "model.name" in capsys.readouterr().out
    assert main(["follow", run.id]) == 0
    assert main(["stop", run.id]) == 1
    assert "finished" in capsys.readouterr().err
    assert main(["train", "--config", str(run.path / "config.yaml"), "--set", "model.args.nope=1"]) == 1
    assert "nope" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_stops_in_order_and_resume_goes_on() -> None:
    long = ["--set", "model.name=mlp", "--set", "epochs=100000", "--set", "checkpoint.every_epochs=0", "--set", "eval_every=0"]
    command = subprocess.Popen(
        [sys.executable, "-m", "workbench.cli", "train", *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        run = _until(lambda: next(iter(Run.all()), None))
        _until(lambda: run.progress.step > 0)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
    finally:
        command.kill()
        run.kill()
    assert command.returncode == 130, err
    assert "Traceback" not in err
    assert run.status == "stopped"
    assert f"workbench resume {run.id}" in out
    stopped_at = run.progress.step
    assert run.checkpoints[-1].name == f"step-{stopped_at}"

    assert main(["resume", run.id]) == 0
    try:
        _until(lambda: run.progress.step > stopped_at)
        assert main(["snapshot", run.id, "--steps", "3"]) == 0
        _until(lambda: any(e.settings == {"steps": 3} for e in run.events if isinstance(e, events.CommandApplied)))
        assert main(["pause", run.id]) == 0
        _until(lambda: run.status == "paused")
        assert main(["resume", run.id]) == 0
        _until(lambda: run.status == "running")
        assert main(["stop", run.id]) == 0
        run.wait(60)
    finally:
        run.kill()
    assert run.status == "stopped"


def _until(condition: Callable[[], Any], timeout: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")
