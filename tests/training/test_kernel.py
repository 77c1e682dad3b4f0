"""``train`` in a notebook's kernel: it gives back what it borrowed, and stops in order."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from workbench import Run, TrainConfig, train
from workbench.errors import DataError, RunError, WorkbenchError

PROBE = """
from workbench.probes import Probe

class Broken(Probe):
    kind = "broken"

    def read(self, context):
        raise RuntimeError("the probe broke")
"""


def switches() -> dict[str, Any]:
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "interrupt": signal.getsignal(signal.SIGINT),
        "directory": os.getcwd(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_random_generators_and_switches_are_given_back(
    failing: bool, deterministic: bool, config: Callable[..., TrainConfig]
) -> None:
    seed()
    expected = draws()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = switches()
        seed()
        chosen = config(epochs=1, deterministic=deterministic, optim__lr=1e-2)
        if failing:
            with pytest.raises(WorkbenchError):
                train(chosen.override({"optim.name": "sgd", "optim.lr": 100, "clip.mode": "off", "epochs": 9}))
        else:
            train(chosen)
        assert draws() == expected
        assert switches() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_and_loader_processes_end_with_the_run(config: Callable[..., TrainConfig]) -> None:
    threads = set(threading.enumerate())
    children = psutil.Process().children(recursive=True)
    gc.disable()  # what lives on in a circle of references lives on
    try:
        train(config(max_steps=5, data__placement="loader", data__workers=1))
        with pytest.raises(DataError) as held:  # its traceback holds every frame
            train(config(data__placement="loader", data__workers=1), data=(Short(64), Short(64)))
        assert {thread for thread in threading.enumerate() if thread.name.startswith("workbench")} <= threads
        assert psutil.Process().children(recursive=True) == children
        assert "Sample" in str(held.value)
    finally:
        gc.enable()


def tensors() -> int:
    """Bytes of all tensors that live."""
    found = (x for x in gc.get_objects() if type(x) in KINDS and x.layout == torch.strided)  # not weights packed for oneDNN
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


KINDS = (torch.Tensor, torch.nn.Parameter)


@pytest.mark.parametrize("failing", [False, True])
def test_a_run_keeps_no_tensors_but_its_models(failing: bool, config: Callable[..., TrainConfig]) -> None:
    chosen = config(epochs=1, data__augment=None)
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        if failing:  # as a notebook does, the test keeps the error
            with pytest.raises(WorkbenchError) as held:
                train(chosen.override({"optim.name": "sgd", "optim.lr": 100, "clip.mode": "off", "epochs": 9}))
            assert "loss became" in str(held.value) and tensors() <= before
        else:
            result = train(chosen)
            own = sum(x.untyped_storage().nbytes() for x in (*result.model.parameters(), *result.model.buffers()))
            assert tensors() <= before + own
    finally:
        gc.enable()


class Short(torch.utils.data.Dataset[Any]):
    """Samples of which one cannot be read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 40:
            raise OSError("the file is gone")
        return torch.full((1, 8, 8), index / self.count), index % 10


def test_an_interrupt_stops_in_order_and_the_run_resumes(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], until: Callable[..., Any], tmp_path: Path
) -> None:
    slow = config(epochs=3, model__args={"pause": 0.03}, log_every=1)
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        until(lambda: any(run.progress.step >= 3 for run in Run.all(tmp_path)))
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    run = train(slow, root=tmp_path).run
    helper.join()
    assert run.status == "stopped"
    assert 3 <= run.progress.step < 24
    assert [path.name for path in run.checkpoints] == [f"step-{run.progress.step}"]
    assert signal.getsignal(signal.SIGINT) is before
    run.resume().wait(timeout=120)
    assert_same(run, train(config(epochs=3, log_every=1)).run)


def test_a_second_interrupt_ends_the_run_at_once(
    config: Callable[..., TrainConfig], until: Callable[..., Any], tmp_path: Path
) -> None:
    def interrupt() -> None:
        until(lambda: any(run.status == "running" for run in Run.all(tmp_path)))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(RunError, match=r"Interrupted.*resume\(\) goes on"):
        train(config(epochs=3, model__args={"pause": 3.0}), root=tmp_path)
    helper.join()
    (run,) = Run.all(tmp_path)
    assert run.status == "failed" and "Interrupted" in (run.error or "")


def test_a_failing_probe_fails_the_run(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_text(PROBE)
    values = config().model_dump()
    values["probes"]["more"] = {f"{source}:Broken": {"every": 3}}
    with pytest.raises(RuntimeError, match="the probe broke"):
        train(TrainConfig(**values), root=tmp_path / "runs")
    (run,) = Run.all(tmp_path / "runs")
    assert run.status == "failed" and "the probe broke" in (run.error or "")


@pytest.mark.parametrize("model", ["net", "normed"])
def test_probes_do_not_change_what_is_trained(model: str, config: Callable[..., TrainConfig]) -> None:
    name = config().model.name.replace(":net", f":{model}")
    runs = []
    for every in (0, 1):
        chosen = config(epochs=2, model__name=name, accumulate=2)
        chosen = chosen.override({f"probes.{kind}.every": every for kind in ("gradients", "activations", "memory")})
        runs.append(train(chosen).run)
    without, with_ = runs
    assert without.readings("gradients").empty and len(with_.readings("gradients")) > 16
    assert without.history["loss"].equals(with_.history["loss"])
    assert without.history["val_loss"].equals(with_.history["val_loss"])
    assert (without.path / "model.safetensors").read_bytes() == (with_.path / "model.safetensors").read_bytes()


def test_a_run_in_the_kernel_is_that_of_fresh_processes(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None]
) -> None:
    """Whatever the kernel drew, set or compiled before."""
    from workbench import launch

    torch.rand(7)
    torch.set_default_dtype(torch.float32)
    assert_same(train(config(epochs=1)).run, launch(config(epochs=1)).wait(timeout=120))


def test_a_run_fails_in_the_kernel_before_it_starts_and_says_so(config: Callable[..., TrainConfig]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(WorkbenchError, match=r"device='cuda'.*no CUDA device.*Take device='auto'"):
        train(config(device="cuda"))
    (run,) = Run.all()
    assert run.status == "failed" and "no CUDA device" in (run.error or "")


def test_the_kernel_keeps_its_working_folder_and_path(config: Callable[..., TrainConfig]) -> None:
    before = list(sys.path), os.getcwd(), dict(os.environ)
    train(config(max_steps=2))
    assert (list(sys.path), os.getcwd(), dict(os.environ)) == before
