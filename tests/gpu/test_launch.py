"""GPU memory is given back: after training in this process, after processes of their own, and after one of them is killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.processes import ranks
from workbench import TrainConfig, launch, launcher, train
from workbench.errors import WorkbenchError

CONFIG = TrainConfig(
    data={"name": "digits", "batch_size": 64, "limit": 512},
    model={"name": "resnet20", "args": {"width": 64}},
    epochs=2,
    device="cuda",
    checkpoint={"every_steps": 3},
    log_every=1,
)
SLACK = 64 << 20
"""Bytes: a context's own tables grow as kernels are loaded."""


def free(device: int) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def until(condition: Callable[[], object], seconds: float) -> float:
    """Wait for a condition; seconds it took. Fails after ``seconds``."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it never came"
        time.sleep(0.05)
    return time.monotonic() - begun


@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_training_here_keeps_no_memory_but_the_models(mode: str) -> None:
    train(CONFIG)  # libraries' own workspaces stay
    torch.cuda.empty_cache()
    allocated, before = torch.cuda.memory_allocated(), free(0)
    result = train(CONFIG.override({"compile": mode}))
    own = sum(tensor.nbytes for tensor in (*result.model.parameters(), *result.model.buffers()))
    print(f"compile={mode}: {(torch.cuda.memory_allocated() - allocated - own) / 2**20:.1f} MiB beside the model")
    assert torch.cuda.memory_allocated() - allocated < own + SLACK
    del result
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - allocated < SLACK
    assert before - free(0) < 2 * SLACK


def test_a_run_that_runs_out_of_memory_here_gives_it_back() -> None:
    train(CONFIG.override({"max_steps": 1}))
    torch.cuda.empty_cache()
    before = free(0)
    wall = torch.empty(int(0.97 * before), dtype=torch.uint8, device="cuda")
    with pytest.raises(WorkbenchError) as held:  # kept, as a notebook keeps it
        train(CONFIG.override({"data.batch_size": 512, "model.args": {"width": 512}}))
    del wall
    torch.cuda.empty_cache()
    assert before - free(0) < SLACK, held.value


@pytest.mark.parametrize("nproc", [1, 2])
def test_processes_give_their_memory_back_and_start_again_when_one_is_killed(nproc: int, tmp_path: Path) -> None:
    """On two GPUs the survivor hangs in a collective of NCCL, and must be ended."""
    if torch.cuda.device_count() < nproc:
        pytest.skip(f"there are not {nproc} GPUs")
    whole = launch(CONFIG.override({"epochs": 40}), nproc, root=tmp_path).wait(timeout=240)
    until(lambda: launcher.at_work(whole.path) is None, 30)
    before = [free(device) for device in range(nproc)]
    run = launch(CONFIG.override({"epochs": 40}), nproc, restarts=1, root=tmp_path)
    until(lambda: run.progress.step > 8 and run.checkpoints, 120)
    family = ranks(run)
    family[nproc - 1].kill()
    seconds = until(lambda: any(event.attempt == 2 and event.type == "steps" for event in run.events), 60)
    print(f"nproc={nproc}: the next attempt's first step after {seconds:.1f} s")
    assert not any(process.is_running() for process in family.values())
    family = ranks(run)
    run.wait(timeout=240)
    until(lambda: launcher.at_work(run.path) is None, 30)
    assert not any(process.is_running() for process in family.values())
    assert all(then - free(device) < SLACK for device, then in enumerate(before))
    assert run.history["step"].tolist() == whole.history["step"].tolist()
    assert seconds < 30
