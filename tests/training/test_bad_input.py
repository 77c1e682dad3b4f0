"""Whatever is wrong with the input: one error that says what, the value and the remedy, and a folder that says the same."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from workbench import Run, TrainConfig, launch, train
from workbench.errors import (
    ConfigError,
    DataError,
    DeviceError,
    ModelError,
    NonFiniteLoss,
    RunError,
    WorkbenchError,
)
from workbench.run import runs_folder


def fails(config: TrainConfig, error: type[WorkbenchError], *words: str, **given: Any) -> str:
    """Train, expecting an error whose text has ``words``; the newest run folder must tell the same."""
    with pytest.raises(error) as caught:
        train(config, **given)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    run = Run.all()[0]
    assert run.status == "failed"
    assert run.error == text
    assert isinstance(run.history["loss"].tolist(), list)
    return text


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.name": "resnet21"}, ["model.name", "no model named 'resnet21'", "Did you mean", "'resnet20'"]),
        ({"model.name": "zzzzzz"}, ["no model named 'zzzzzz'", "There are", "known names"]),
        ({"data.name": "digit"}, ["no data set named 'digit'", "'digits'"]),
        ({"optim.name": "adamv"}, ["no optimizer named 'adamv'", "'adam'"]),
        ({"loss.name": "crossentropy"}, ["no loss named 'crossentropy'", "'cross_entropy'"]),
        ({"data.augment": ["flipp"]}, ["no augmentation named 'flipp'", "'flip'"]),
        ({"epochs": 0}, ["epochs=0 must be greater than or equal to 1", "Passes over the training samples"]),
        ({"optim.lr": -1}, ["optim.lr=-1 must be greater than 0", "learning rate"]),
        ({"optim.lr": float("nan")}, ["optim.lr=nan must be", "finite"]),
        ({"optim.momentum": 1.5}, ["optim.momentum=1.5 must be less than 1"]),
        ({"data.batch_size": "many"}, ["data.batch_size='many' must be a valid integer", "Samples per optimizer step"]),
        ({"precision": "fp4"}, ["precision='fp4' must be", "'bf16'"]),
        ({"schedule.name": "cosin"}, ["schedule.name='cosin' must be", "'cosine'"]),
        ({"optim.learning_rate": 0.1}, ["optim.learning_rate is not a setting of OptimConfig", "it has", "lr"]),
        ({"epoch": 3}, ["epoch is not a setting of TrainConfig", "did you mean 'epochs'"]),
        ({"optim.args": {"hook": print}}, ["optim.args", "cannot be written to a file", "numbers, text"]),
        ({"mesh.shard": 0}, ["mesh.shard=0 must be 'all', or greater than or equal to 1"]),
        ({"label": "x" * 61}, ["label", "at most 60"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().override(changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_only_a_train_config_is_trained() -> None:
    with pytest.raises(RunError, match=r"config is a dict, not a TrainConfig.*TrainConfig\(data="):
        train({"epochs": 1})  # type: ignore[arg-type]


def test_no_run_has_fewer_than_one_process(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(RunError, match="nproc=0 must be at least 1"):
        launch(config(), nproc=0)


# -- batches ------------------------------------------------------------------------------------------------------


def test_a_batch_must_divide_into_micro_steps(config: Callable[..., TrainConfig]) -> None:
    fails(config(accumulate=3), ConfigError, "data.batch_size=32 does not divide", "accumulate=3", "multiple of 3, e.g. 33")


def test_a_batch_must_not_exceed_the_data(config: Callable[..., TrainConfig]) -> None:
    fails(config(data__batch_size=257), ConfigError, "data.batch_size=257 is larger than the 256 training samples", "at most 256")


# -- models and losses ----------------------------------------------------------------------------------------------


def test_a_model_whose_output_has_too_few_classes(config: Callable[..., TrainConfig]) -> None:
    fails(config(model__num_classes=3), ModelError, "3 outputs", "label", "model.num_classes")


def test_a_model_whose_output_does_not_fit_the_loss(config: Callable[..., TrainConfig]) -> None:
    fails(
        config(loss__name="bce_with_logits"),
        ModelError,
        "float32 [2, 10]",
        "does not fit the loss 'bce_with_logits'",
        "int64 [2]",
    )


def test_a_model_that_does_not_take_the_data(config: Callable[..., TrainConfig]) -> None:
    fails(config(model__in_channels=3), ModelError, "fails on an input of shape [2, 1, 8, 8]", "model.in_channels")


def test_a_model_that_does_not_take_its_arguments(config: Callable[..., TrainConfig]) -> None:
    fails(config(model__args={"widht": 4}), ConfigError, "does not take these arguments", "widht", "model.args")


def test_an_optimizer_that_does_not_take_its_arguments(config: Callable[..., TrainConfig]) -> None:
    fails(config(optim__args={"rho": 4}), ConfigError, "optimizer 'adamw' does not take these arguments", "rho")


def test_a_module_that_cannot_be_pickled_is_named_with_its_remedy(config: Callable[..., TrainConfig]) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(RunError, match="Sequential cannot be kept in the run folder.*name it: 'file.py:function'"):
        train(config(), model=module)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def net(:\n", ["fails to import", "SyntaxError"]),
        ("import no_such_package\n", ["fails to import", "no_such_package"]),
        ("raise ValueError('not today')\n", ["fails to import", "ValueError: not today"]),
        ("def other(): ...\n", ["no name in", "'net'"]),
        ("def net(**shape):\n    raise OSError('no weights')\n", ["could not be built", "OSError: no weights"]),
        ("net = 3\n", ["not a callable"]),
        ("def net(**shape):\n    return 'model'\n", ["returned str"]),
    ],
)
def test_a_users_file_that_does_not_work(
    content: str, words: list[str], config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    source = tmp_path / "broken.py"
    source.write_text(content)
    fails(config(model__name=f"{source}:net"), WorkbenchError, *words)


def test_a_users_file_that_is_not_there(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(RunError, match=r"'nowhere.py', named by 'nowhere.py:net', does not exist. Check the path"):
        train(config(model__name="nowhere.py:net"))


def test_a_loss_that_runs_away(config: Callable[..., TrainConfig]) -> None:
    wild = config(optim={"name": "sgd", "lr": 100}, clip__mode="off", schedule__warmup=0, epochs=20)
    text = fails(wild, NonFiniteLoss, "The loss became", "at step", "learning rate", "optim.lr=10", "clip.mode=dynamic")
    history = Run.all()[0].history
    bad = int(text.split("at step ")[1].split(" ")[0])
    assert np.isfinite(history["loss"].iloc[: bad - 1]).all() and not np.isfinite(history["loss"].iloc[bad - 1])


# -- data -----------------------------------------------------------------------------------------------------------


class Samples(Dataset[Any]):
    """Images and labels; ``index`` misbehaves as ``fault`` says."""

    def __init__(self, fault: str = "", index: int = 20, count: int = 64) -> None:
        self.fault, self.index, self.count = fault, index, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        x, y = torch.full((1, 8, 8), index / self.count), index % 10
        if index == self.index:
            match self.fault:
                case "raises":
                    raise OSError("the file is gone")
                case "shape":
                    x = torch.zeros(1, 9, 8)
                case "label":
                    y = 10
                case "negative":
                    y = -1
                case "alone":
                    return x
        return x, y


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raises", ["Sample 20 cannot be read", "OSError: the file is gone", "Mend or remove it"]),
        ("shape", ["Samples do not stack into a batch", "Give every sample the same shape"]),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(
    fault: str, words: list[str], workers: int, config: Callable[..., TrainConfig]
) -> None:
    chosen = config(data={"batch_size": 16, "workers": workers}, model__num_classes=10)
    fails(chosen, DataError, *words, data=(Samples(fault), Samples()))


def test_a_data_set_without_targets(config: Callable[..., TrainConfig]) -> None:
    class Inputs(Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(1, 8, 8)

    chosen = config(data={"batch_size": 16, "workers": 0}, model__num_classes=10)
    fails(chosen, DataError, "not a pair (x, y)", "Return (input, target)", data=(Inputs(), Inputs()))


@pytest.mark.parametrize(("fault", "label"), [("label", "10"), ("negative", "-1")])
def test_a_label_out_of_range_is_named(fault: str, label: str, config: Callable[..., TrainConfig]) -> None:
    chosen = config(data={"batch_size": 16, "workers": 0}, model__num_classes=10)
    fails(chosen, WorkbenchError, label, "model.num_classes", data=(Samples(fault), Samples()))


def test_data_of_another_kind(config: Callable[..., TrainConfig]) -> None:
    fails(config(), DataError, "the data given gave int, not data", "a pair (train, eval)", data=3)


def test_a_stream_of_samples_has_no_length(config: Callable[..., TrainConfig]) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    fails(config(), DataError, "Stream has no length", "__len__", data=(Stream(), Stream()))


def test_an_empty_split(config: Callable[..., TrainConfig]) -> None:
    fails(config(), DataError, "empty split", data=(Samples(count=64), Samples(count=0)))


def png(value: int, size: int = 8) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a tiny CIFAR-10 in which row 3 of the training images is as given."""
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    monkeypatch.setenv("WORKBENCH_DATA", str(folder.parent))

    def write(row: bytes | None, column: str = "label") -> None:
        images = [png(index) for index in range(8)]
        pq.write_table(pa.table({"image": images, "label": list(range(8))}), folder / "test.parquet")
        images[3] = row if row is not None else images[3]
        pq.write_table(pa.table({"image": images, column: list(range(8))}), folder / "train.parquet")

    return write


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (png(3)[:40], ["train.parquet, row 3", "cannot be decoded", "Remove the row"]),
        (b"", ["train.parquet, row 3", "cannot be decoded"]),
        (png(3, size=9), ["train.parquet, row 3", "(9, 9, 3)", "(8, 8, 3)", "Resize"]),
    ],
)
def test_a_corrupt_image_is_named_by_its_row(
    row: bytes, words: list[str], cifar: Callable[..., None], config: Callable[..., TrainConfig]
) -> None:
    cifar(row)
    fails(config(data={"name": "cifar10", "batch_size": 4}), DataError, *words)


def test_a_parquet_file_without_labels(cifar: Callable[..., None], config: Callable[..., TrainConfig]) -> None:
    cifar(None, column="class")
    fails(config(data={"name": "cifar10", "batch_size": 4}), DataError, "has no column label", "it has image, class")


def test_a_file_that_is_not_parquet(cifar: Callable[..., None], config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    cifar(None)
    (tmp_path / "data" / "cifar10" / "train.parquet").write_bytes(b"not parquet")
    fails(config(data={"name": "cifar10", "batch_size": 4}), DataError, "not a readable Parquet file", "Fetch it again")


@pytest.mark.parametrize("network", ["absent", "silent"])
def test_missing_data_without_a_network_is_said_soon(
    network: str, config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``silent``: something takes the connection and never answers."""
    monkeypatch.setattr("workbench.data.images.PATIENCE", 1.0)
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies that it met first
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if network == "absent":
            server.close()
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("no_proxy", "")
        fails(config(data={"name": "cifar10"}), DataError, "CIFAR-10 is not below", "cannot be downloaded", "Set WORKBENCH_DATA")


# -- runs in processes of their own -----------------------------------------------------------------------------------


def test_a_launched_run_without_its_device_says_so(config: Callable[..., TrainConfig]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = launch(config(device="cuda")).wait(timeout=120, check=False)
    assert run.status == "failed"
    assert "device='cuda', but PyTorch sees no CUDA device here. Take device='auto'" in (run.error or "")
    assert run.history.empty and run.config.device == "cuda"
    with pytest.raises(RunError, match="failed: device='cuda'"):
        run.wait()


def test_an_error_of_any_rank_is_told_and_the_run_goes_on_once_it_is_cured(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample in the second rank's half of a batch; rank 0 only sees its peer go."""
    source = tmp_path / "samples.py"
    source.write_text(
        "import os, torch\n"
        "class Samples(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, index):\n"
        "        if os.environ.get('FAULT') and os.environ.get('RANK') == '1': raise OSError('the disk of rank 1 is gone')\n"
        "        return torch.full((1, 8, 8), index / 64), index % 10\n"
        "def splits(): return Samples(), Samples()\n"
    )
    chosen = config(data={"name": f"{source}:splits", "batch_size": 16, "workers": 0}, model__num_classes=10, epochs=2)
    monkeypatch.setenv("FAULT", "1")
    run = launch(chosen, nproc=2).wait(timeout=120, check=False)
    assert run.status == "failed"
    assert "OSError: the disk of rank 1 is gone" in (run.error or ""), run.error
    monkeypatch.delenv("FAULT")
    assert run.resume().wait(timeout=120).status == "finished"
    assert run.error is None


def test_two_starters_of_one_run(config: Callable[..., TrainConfig], until: Callable[..., Any]) -> None:
    run = launch(config(epochs=100, model__args={"pause": 0.05}))
    until(lambda: run.status == "running")
    second = subprocess.run(
        [sys.executable, "-m", "workbench.worker", str(run.path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert second.returncode == 1
    assert "is at the run" in second.stderr and "Open it with Run.open" in second.stderr, second.stderr
    assert run.status == "running"
    run.kill()
    assert run.status == "lost"


def test_a_run_resumed_by_many_at_once_starts_once(config: Callable[..., TrainConfig], until: Callable[..., Any]) -> None:
    run = train(config(epochs=100, model__args={"pause": 0.01}), replay=[(3, "stop", {})]).run
    errors: list[Exception] = []

    def resume() -> None:
        try:
            Run.open(run.path).resume()
        except RunError as error:
            errors.append(error)

    threads = [threading.Thread(target=resume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((run.path / "attempts").glob("*.json"))) == 2
    until(lambda: run.status == "running")
    run.kill()


LIMITED = """
import resource, sys
from workbench import TrainConfig, train
{limit}
train(TrainConfig(**{config!r}), root={root!r})
"""


def limited(config: TrainConfig, limit: str, root: Path) -> tuple[Run, str]:
    """Train in a process under a limit of the system; the run, and what the process printed."""
    code = LIMITED.format(limit=limit, config=config.model_dump(mode="json"), root=str(root))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    (run,) = Run.all(root)
    return run, done.stderr


def test_files_beyond_a_limit_are_a_full_disk(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    large = config(model={"name": "mlp", "args": {"widths": [300, 300]}}, checkpoint__every_steps=5)
    run, printed = limited(large, "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))", tmp_path / "runs")
    assert "RunError" in printed and "is full" in printed
    assert run.status == "failed" and "is full" in (run.error or "") and "Free some space" in (run.error or "")
    assert run.history["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.checkpoints == [] and not list((run.path / "checkpoints").glob("*.tmp"))
    resumed = Run.open(run.path).resume().wait(timeout=120)
    assert resumed.status == "finished" and len(resumed.history) == 24


def test_a_full_disk_leaves_room_to_say_so(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """A disk of a megabyte: the run's last words take the place of a reserve kept for them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes the rights of root")
    try:
        large = config(model={"name": "mlp", "args": {"widths": [150, 150]}}, checkpoint__every_steps=2, checkpoint__keep=9)
        run, printed = limited(large, "", disk)
        assert "is full" in printed
        assert run.status == "failed" and "is full" in (run.error or "")
        assert len(run.checkpoints) >= 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_checkpoint_of_another_user_is_not_opened(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("giving a file away takes the rights of root")
    run = train(config(), replay=[(3, "stop", {})], root=tmp_path).run
    os.chown(run.checkpoints[-1], 12345, 12345)
    run.resume().wait(timeout=120, check=False)
    assert run.status == "failed"
    assert "belongs to another user, and opening one can run code" in (run.error or "") and "copy the run folder" in (
        run.error or ""
    )
    mine = tmp_path / "runs-of-mine"
    mine.mkdir()
    shutil.copytree(run.path, mine / run.id)
    assert Run.open(mine / run.id).resume().wait(timeout=120).status == "finished"


def test_a_runs_folder_that_cannot_be_made(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(RunError, match="cannot be made.*Set WORKBENCH_RUNS"):
        train(config())
    with contextlib.suppress(OSError):
        assert not runs_folder().exists()


def test_a_precision_that_the_cpu_does_not_have(config: Callable[..., TrainConfig]) -> None:
    fails(config(precision="fp16"), DeviceError, "precision='fp16' trains on CUDA only", "Take bf16 or fp32")
    fails(config(precision="tf32"), DeviceError, "precision='tf32' needs an NVIDIA GPU", "Take fp32 or bf16")
