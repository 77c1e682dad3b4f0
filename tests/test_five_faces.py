"""One config, five faces: code, YAML, command line, papermill and form give the same run, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import papermill
import pytest

from workbench import Run, TrainConfig, train

CONFIG = TrainConfig(
    data={"name": "digits", "limit": 256, "batch_size": 32, "augment": ("shift",)},
    model={"name": "mlp", "args": {"widths": [32]}},
    optim={"name": "sgd", "lr": 0.05},
    schedule={"name": "linear"},
    epochs=2,
    seed=3,
    device="cpu",
    label="faces",
)
CHANGES = [f"{name}={value!r}" for name, value in CONFIG.changes_from(TrainConfig()).items()]
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "pipelines" / "train.ipynb"


def by_code(folder: Path) -> Run:
    scope: dict[str, object] = {}
    exec(f"from workbench import TrainConfig, train\nresult = train({CONFIG.to_code()})", scope)
    return scope["result"].run  # type: ignore[attr-defined]


def by_yaml(folder: Path) -> Run:
    CONFIG.to_yaml(folder / "config.yaml")
    return train(TrainConfig.from_yaml(folder / "config.yaml")).run


def by_command_line(folder: Path) -> Run:
    command = [sys.executable, "-m", "workbench.cli", "train", *(part for change in CHANGES for part in ("--set", change))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Run.open(shown.splitlines()[0])


def by_papermill(folder: Path) -> Run:
    CONFIG.to_yaml(folder / "config.yaml")
    parameters = {"config": str(folder / "config.yaml"), "overrides": ["label=faces"]}
    papermill.execute_notebook(str(NOTEBOOK), str(folder / "out.ipynb"), parameters, progress_bar=False, cwd=str(folder))
    return Run.all()[0]


def by_form(folder: Path) -> Run:
    """A form filled in field by field, as a page would."""
    from widgets.form import Form

    form = Form(TrainConfig)
    try:
        form.value = CONFIG
        return train(form.value).run
    finally:
        form.close()


def by_repro(folder: Path) -> Run:
    """What the run folder says would repeat it."""
    first = train(CONFIG).run
    subprocess.run([sys.executable, first.path / "repro.py"], check=True, cwd=folder, capture_output=True)
    return next(run for run in Run.all() if run.path != first.path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(CONFIG, root=tmp_path_factory.mktemp("reference")).run


@pytest.mark.parametrize("face", [by_code, by_yaml, by_command_line, by_papermill, by_form, by_repro])
def test_every_face_gives_the_same_run(face: Callable[[Path], Run], reference: Run, tmp_path: Path) -> None:
    run = face(tmp_path)
    assert run.status == "finished"
    assert run.config == CONFIG
    assert run.path != reference.path
    assert list(run.history["loss"]) == list(reference.history["loss"])
    assert run.metrics == reference.metrics
    assert (run.path / "model.safetensors").read_bytes() == (reference.path / "model.safetensors").read_bytes()
