"""Pipelines: chained, skipped when nothing changed, gone on with after a kill, equal to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.cli import main
from workbench.errors import ConfigError, RunError
from workbench.pipeline import PipelineConfig, run_pipeline
from workbench.run import Run
from workbench.stage import MAX_BYTES, State

NOTEBOOKS = Path(__file__).parents[1] / "notebooks" / "pipelines"
MAKE = "from workbench.notebook import output, results_folder\n"


def notebook(path: Path, parameters: str, *cells: str) -> Path:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (parameters, *cells)])
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stages: ``add`` gives a number and a file, ``double`` doubles the number and reads the file."""
    notebook(
        tmp_path / "add.ipynb",
        "a = 1\nb = 1\nnoise = 0",
        MAKE + "file = results_folder() / 'sum.txt'\nfile.write_text(str(a + b))\noutput(sum=a + b, file=file)",
    )
    notebook(
        tmp_path / "double.ipynb",
        "number = 0\nfile = ''",
        MAKE + "from pathlib import Path\nassert Path(file).read_text() == str(number)\noutput(twice=2 * number)",
    )
    (tmp_path / "sums.yaml").write_text(
        """
stages:
  - {name: double, notebook: double.ipynb, parameters: {number: "${add.sum}", file: "${add.file}"}}
  - {name: add, notebook: add.ipynb, parameters: {a: 2, b: 3}}
"""
    )
    return tmp_path


def test_a_stage_gets_what_an_earlier_one_gave_and_is_skipped_when_unchanged(folder: Path) -> None:
    config, said = PipelineConfig.from_yaml(folder / "sums.yaml"), list[str]()
    assert [each.name for each in config.order()] == ["add", "double"]
    first = run_pipeline(config, folder / "out", echo=said.append)
    assert first.outputs["double"] == {"twice": 10}
    assert first.outputs["add"]["file"] == folder / "out" / "add" / "sum.txt"
    assert said[0] == "[1/2] add: runs"

    assert run_pipeline(config, folder / "out").skipped == ["add", "double"]
    # Other inputs, same result: what follows need not run again.
    assert run_pipeline(config.change(["add.a=3", "add.b=2"]), folder / "out").skipped == ["double"]
    changed = run_pipeline(config.change(["add.a=4"]), folder / "out")
    assert changed.skipped == []
    assert changed.outputs["double"] == {"twice": 14}
    # A result that was tampered with is made anew.
    (folder / "out" / "add" / "sum.txt").write_text("8")
    assert run_pipeline(config.change(["add.a=4"]), folder / "out").skipped == ["double"]
    assert (folder / "out" / "add" / "sum.txt").read_text() == "7"


def test_the_command_line_runs_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pipeline", str(folder / "sums.yaml"), "--output", str(folder / "out"), "--set", "add.a=5"]
    assert main(arguments) == 0
    assert "double.twice = 16" in capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("unchanged, skipped") == 2


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("[{name: a, notebook: add.ipynb}, {name: a, notebook: add.ipynb}]", "two stages are named a"),
        ("[{name: a, notebook: add.ipynb, needs: [b]}]", "There is no stage"),
        ("[{name: a, notebook: add.ipynb, needs: [b]}, {name: b, notebook: add.ipynb, needs: [a]}]", "wait for each other"),
        ("[{name: a, notebook: absent.ipynb}]", "cannot be read"),
        ("[{name: a, notebook: add.ipynb, parameters: {nois: 1}}]", "did you mean 'noise'"),
        ("[{name: a, notebook: add.ipynb}, {name: b, notebook: add.ipynb, parameters: {a: '${a.sums}'}}]", "no output"),
        ("[{name: a, notebok: add.ipynb}]", "did you mean 'notebook'"),
        ("[]", "stages"),
        ("[{name: a", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_in_words(folder: Path, stages: str, words: str) -> None:
    (folder / "wrong.yaml").write_text(f"stages: {stages}")
    with pytest.raises(ConfigError) as raised:
        run_pipeline(PipelineConfig.from_yaml(folder / "wrong.yaml"), folder / "out")
    assert words.casefold() in str(raised.value).casefold()


def one_stage(folder: Path, *cells: str, **settings: Any) -> PipelineConfig:
    notebook(folder / "one.ipynb", "x = 0", *cells)
    return PipelineConfig(folder=str(folder), stages=[{"name": "one", "notebook": "one.ipynb", **settings}])


def test_a_config_file_beside_the_pipeline_counts_as_an_input(folder: Path) -> None:
    (folder / "books").mkdir()
    cell = MAKE + "from pathlib import Path\noutput(text=Path(config).read_text())"
    notebook(folder / "books" / "one.ipynb", "config = None", cell)
    stages = [{"name": "one", "notebook": "books/one.ipynb", "config": "settings.yaml"}]
    config = PipelineConfig(folder=str(folder), stages=stages)
    (folder / "settings.yaml").write_text("epochs: 1")
    assert run_pipeline(config, folder / "out").outputs["one"]["text"] == "epochs: 1"
    assert run_pipeline(config, folder / "out").skipped == ["one"]
    (folder / "settings.yaml").write_text("epochs: 2")
    assert run_pipeline(config, folder / "out").outputs["one"]["text"] == "epochs: 2"


def test_a_cell_that_fails_says_so_and_runs_again(folder: Path) -> None:
    config = one_stage(folder, "from pathlib import Path\nassert Path('flag').exists(), 'no flag yet'")
    with pytest.raises(RunError, match=r"'one' failed in cell .*AssertionError: no flag yet.*one\.ipynb"):
        run_pipeline(config, folder / "out")
    assert State.read(folder / "out" / "one").status == "failed"
    (folder / "flag").touch()  # notebooks run in their own folder
    assert run_pipeline(config, folder / "out").skipped == []
    assert run_pipeline(config, folder / "out").skipped == ["one"]


def test_a_kernel_that_dies_is_noticed(folder: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(RunError, match="kernel of the stage 'one' died"):
        run_pipeline(one_stage(folder, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), folder / "out")
    assert time.monotonic() - begun < 60


def test_a_cell_that_hangs_is_ended(folder: Path) -> None:
    with pytest.raises(RunError, match="longer than its timeout of 2 s"):
        run_pipeline(one_stage(folder, "import time\ntime.sleep(600)", timeout=2), folder / "out")


def test_an_executed_notebook_stays_small(folder: Path) -> None:
    run_pipeline(one_stage(folder, "print('kept')", "print('x' * 1_000_000)"), folder / "out")
    path = folder / "out" / "one" / "one.ipynb"
    assert path.stat().st_size <= MAX_BYTES
    assert "kept" in path.read_text()
    assert "was left out" in path.read_text()


def test_two_at_once_are_refused(folder: Path) -> None:
    config = one_stage(
        folder, "import time\nfrom workbench.notebook import results_folder\n(results_folder() / 'on').touch()\ntime.sleep(60)"
    )
    config.to_yaml(folder / "one.yaml")
    first = subprocess.Popen([*COMMAND, str(folder / "one.yaml"), "--output", str(folder / "out")], stdout=subprocess.DEVNULL)
    try:
        until((folder / "out" / "one" / "on").exists)
        with pytest.raises(RunError, match="Another process"):
            run_pipeline(config, folder / "out")
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
    finally:
        first.kill()
        first.wait()


COMMAND = [sys.executable, "-m", "workbench.cli", "pipeline"]
TRAIN = """
from workbench import TrainConfig
from workbench.notebook import output, train_or_resume
data = {"limit": 256, "batch_size": 32}
result = train_or_resume(TrainConfig(data=data, model={"name": "mlp"}, epochs=epochs, checkpoint={"every_steps": 5}))
output(run=result.run, **result.metrics)
"""


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_inside_its_training(folder: Path) -> None:
    notebook(folder / "train.ipynb", "epochs = 1\nnumber = 0", TRAIN)
    (folder / "train.yaml").write_text(
        """
stages:
  - {name: add, notebook: add.ipynb}
  - {name: train, notebook: train.ipynb, parameters: {epochs: 30, number: "${add.sum}"}}
"""
    )
    config, stages = PipelineConfig.from_yaml(folder / "train.yaml"), folder / "out" / "train"
    whole = run_pipeline(config, folder / "whole")

    killed = subprocess.Popen([*COMMAND, str(folder / "train.yaml"), "--output", str(folder / "out")], stdout=subprocess.DEVNULL)
    try:
        run: Run = until(lambda: next(iter(Run.all(stages / "runs")), None))
        until(lambda: run.checkpoints)
    finally:
        killed.kill()
        killed.wait()
    assert State.read(stages).status == "running"
    assert run.status != "finished"

    said: list[str] = []
    result = run_pipeline(config, folder / "out", echo=said.append)
    assert said[:2] == ["[1/2] add: unchanged, skipped", "[2/2] train: goes on"]
    assert result.outputs["train"]["run"] == run.path
    assert len(list((run.path / "attempts").glob("*.json"))) == 2
    other = Run.open(whole.outputs["train"]["run"])
    assert list(run.history["loss"]) == list(other.history["loss"])
    assert run.metrics == other.metrics
    assert (run.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_pipelines_of_equal_inputs_are_equal_to_the_bit(tmp_path: Path) -> None:
    config = PipelineConfig.from_yaml(NOTEBOOKS / "compress.yaml")
    config = config.model_copy(update={"stages": [each for each in config.stages if each.name != "compare"]})
    config = config.change(["train.epochs=1", "train.overrides=[data.limit=256]", "prune.epochs=1"])
    results = [run_pipeline(config, tmp_path / name) for name in ("one", "two")]
    for stage, outputs in results[0].outputs.items():
        for name, value in outputs.items():
            other = results[1].outputs[stage][name]
            if isinstance(value, Path):
                assert (value / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
            else:
                assert value == other
        assert json.loads((tmp_path / "one" / stage / "stage.json").read_text())["digests"]


def until(condition: Callable[[], Any], timeout: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")
