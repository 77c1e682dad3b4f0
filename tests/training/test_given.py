"""Runs given a module or a data set as Python objects, not by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from workbench import TrainConfig, launch, train
from workbench.errors import DataError, RunError

CONFIG = TrainConfig(data={"batch_size": 20, "workers": 0}, epochs=2, device="cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Noise(Dataset[tuple[Tensor, int]]):
    """Random samples: the same ones in whichever process they are drawn."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(16), index % 4


def test_a_module_and_a_data_set_of_ones_own_train_alike_here_and_in_another_process() -> None:
    torch.manual_seed(0)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    here = train(CONFIG, model=net, data=Noise())
    there = launch(CONFIG, model=net, data=Noise()).wait(120)
    assert here.run.history["loss"].tolist() == there.history["loss"].tolist()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    trained = there.load_model()
    assert type(trained).__name__ == "Net"
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), here.model.parameters(), strict=True))


def test_repro_repeats_a_run_that_was_given_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(CONFIG, model=Net(), data=Noise()).run
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    path = [str(Path(__file__).parent), *sys.path]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    script = f"{(run.path / 'repro.py').read_text()}\nprint(result.run.history['loss'].tolist())"
    (run.path / "repeated.py").write_text(script)
    printed = subprocess.run([sys.executable, run.path / "repeated.py"], capture_output=True, text=True, check=True).stdout
    assert eval(printed.strip().splitlines()[-1]) == run.history["loss"].tolist()


def test_data_that_cannot_be_kept_trains_here_but_is_not_launched() -> None:
    data = Noise()
    data.lock = __import__("threading").Lock()  # type: ignore[attr-defined]
    assert train(CONFIG, model=Net(), data=data).run.status == "finished"
    with pytest.raises(RunError, match="Noise cannot be kept in the run folder"):
        launch(CONFIG, model=Net(), data=data)
    with pytest.raises(DataError, match="kept no copy|could keep no copy"):
        train(CONFIG.override({"data.name": "source/data.pkl"}), model=Net())


def test_an_augmentation_and_a_probe_of_ones_own_are_kept_with_the_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from workbench.probes import Probe\n"
        "import torch\n"
        "def darker(x, draw):\n    return x // 2\n"
        "class Count(Probe):\n"
        "    kind = 'counts'\n"
        "    def read(self, context):\n        return torch.tensor([context.step])\n"
        "    def table(self, step, values):\n        return {'step': [step], 'count': [int(values[0])]}\n"
    )
    own = {"model.name": "mlp", "data.augment": [f"{file}:darker"], "probes.more": {f"{file}:Count": {"every": 5}}}
    config = CONFIG.override(own)
    run = train(config.override({"max_steps": 20}), replay=[(10, "stop", {})]).run
    assert run.readings("counts")["count"].tolist() == [1, 5, 10]
    file.unlink()
    assert run.resume().wait(120).readings("counts")["count"].tolist() == [1, 5, 10, 15, 20]
