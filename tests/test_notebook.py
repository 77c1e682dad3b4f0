"""Inside a notebook: %%model, settings from a parameters cell, results for later stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench import Run, TrainConfig, launch, train
from workbench.errors import ConfigError, RunError
from workbench.notebook import configure, define, output, results_folder, train_or_resume
from workbench.registry import load_object
from workbench.run import runs_folder

CELL = """
import torch
from torch import nn

WIDTH = 16


class TinyNet(nn.Module):
    def __init__(self, num_classes: int = 10, width: int = WIDTH) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)
"""
SHORT = {"data": {"name": "digits", "limit": 256, "batch_size": 64}, "epochs": 2, "device": "cpu"}


# -- %%model ------------------------------------------------------------------------------------------------------------


def test_a_model_cell_is_kept_as_a_file_and_named_by_it() -> None:
    net = define(CELL)["TinyNet"]
    path = Path(net.__workbench_source__.removesuffix(":TinyNet"))
    assert path.name == "tiny_net.py"
    assert path.read_text() == CELL
    assert runs_folder() / ".cells" in path.parents
    assert TrainConfig(model={"name": net}).model.name == f"{path}:TinyNet"
    assert eval(TrainConfig(model={"name": net}).to_code()) == TrainConfig(model={"name": net})
    assert define(CELL)["TinyNet"] is net
    assert define(CELL + "# edited\n", "other name")["TinyNet"] is not net
    assert Run.all() == []


def test_a_model_cell_trains_in_another_process_after_an_edit() -> None:
    config = TrainConfig(model={"name": define(CELL)["TinyNet"]}, **SHORT)
    here = train(config)
    run = launch(config).wait(120)
    define(CELL.replace("WIDTH = 16", "WIDTH = 8"))
    assert list(run.history["loss"]) == list(here.run.history["loss"])
    assert type(run.load_model()).__name__ == "TinyNet"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import torch\nx = 1", "defines no class"),
        ("def f(:", "not valid Python"),
        ("def f():\n    return nn.Linear(1, 1)", "uses nn, which it neither"),
        ("def f():\n    return 1\nraise OSError('no disk')", "OSError: no disk"),
    ],
)
def test_a_model_cell_that_cannot_stand_alone_is_refused(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        define(source)


def test_the_magic_in_ipython(tmp_path: Path) -> None:
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
assert shell.run_cell("%load_ext workbench").success
assert shell.run_cell({"%%model" + CELL!r}).success
assert shell.run_cell("from workbench import TrainConfig; print(TrainConfig(model={{'name': TinyNet}}).model.name)").success
"""
    environment = {"WORKBENCH_RUNS": str(tmp_path / "runs"), "IPYTHONDIR": str(tmp_path / "ipython"), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "tiny_net.py:TinyNet" in shown.stdout, shown.stdout + shown.stderr


def test_classes_and_functions_are_named_by_where_they_can_be_imported() -> None:
    from workbench.models.convnet import convnet

    assert TrainConfig(model={"name": convnet}).model.name == "workbench.models.convnet:convnet"
    assert TrainConfig(data={"name": load_object}).data.name == "workbench.registry:load_object"

    def local() -> None: ...

    class Derived(define(CELL)["TinyNet"]):  # type: ignore[misc]
        """It has no source of its own."""

    for nameless in (local, lambda: None, Derived):
        with pytest.raises(ConfigError, match=r"model\.name: .*%%model"):
            TrainConfig(model={"name": nameless})
    with pytest.raises(ConfigError, match=r"model\.name"):
        TrainConfig(model={"name": 3})


# -- parameters and results ---------------------------------------------------------------------------------------------


def test_settings_from_the_three_parameters(tmp_path: Path) -> None:
    default = TrainConfig(epochs=5)
    assert configure(default) is not None
    assert configure(default).epochs == 5
    assert configure(default, {"epochs": 6}, ["optim.lr=0.1"]) == TrainConfig(epochs=6, optim={"lr": 0.1})
    TrainConfig(epochs=7).to_yaml(tmp_path / "config.yaml")
    assert configure(default, str(tmp_path / "config.yaml")).epochs == 7
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        configure(default, None, ["optim.lrr=1"])


def test_output_does_nothing_outside_a_pipeline_and_adds_up_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    output(loss=1.0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORKBENCH_STAGE", str(tmp_path / "stage"))
    (tmp_path / "stage").mkdir()
    output(loss=np.float32(0.5), names=["a"])
    output(page=results_folder() / "page.html")
    written = json.loads((tmp_path / "stage" / "outputs.json").read_text())
    assert written == {
        "loss": {"value": 0.5},
        "names": {"value": ["a"]},
        "page": {"path": str(tmp_path / "stage" / "page.html")},
    }
    with pytest.raises(RunError, match="'model' is a object"):
        output(model=object())


@pytest.mark.slow
def test_training_resumes_by_config_and_model() -> None:
    config = TrainConfig(model={"name": "mlp"}, **SHORT)
    first = train_or_resume(config)
    again = train_or_resume(config)
    assert again.run.path == first.run.path
    assert again.metrics == first.metrics
    assert _weights(again.model) == _weights(first.model)
    assert train_or_resume(config.override({"seed": 1})).run.path != first.run.path
    tuned = train_or_resume(config, model=first.model)
    assert tuned.run.path != first.run.path
    assert train_or_resume(config, model=first.model).run.path == tuned.run.path


def _weights(model: Any) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in model.state_dict().items()}
