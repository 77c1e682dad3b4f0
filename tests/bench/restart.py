"""A process of a run is killed in the middle of a step: how long until the others have ended, or all train again.

    python -m tests.bench.restart            # on GPUs where there are any, else on CPUs
    python -m tests.bench.restart --nproc 4

Victims are the last rank, rank 0, and the parent of all. For each: seconds from the kill to the end of every other process (no
restart left), and to the first step after the restart; processes left, GPU memory not given back, steps repeated since the last
checkpoint. The losses are compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable

import psutil
import torch

from tests.processes import ranks
from workbench import Run, TrainConfig, launch, launcher

CONFIG = TrainConfig(
    data={"name": "digits", "batch_size": 64},
    model={"name": "resnet20"},
    epochs=6,
    deterministic=True,
    log_every=1,
    eval_every=0,
    checkpoint={"every_epochs": 0, "every_steps": 10},
)
KILL_AT = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--nproc", type=int, default=min(gpus, 8) or 2)
    nproc = parser.parse_args().nproc
    print(f"{nproc} ranks on {torch.cuda.get_device_name() if gpus else 'CPU'}; load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        whole = launch(CONFIG, nproc, root=folder).wait()
        for victim in dict.fromkeys((nproc - 1, 0)):
            print(f"rank {victim}: the others ended after {ended(nproc, victim, folder):.1f} s", flush=True)
            seconds, run = restarted(nproc, victim, folder)
            lost = KILL_AT // 10 * 10
            difference = (run.history["loss"] - whole.history["loss"]).abs().max()
            start = [event.step for event in run.events if event.type == "attempt_started"][-1]
            print(
                f"rank {victim}: first step of the restart after {seconds:.1f} s, from step {start} (checkpoint due at {lost}); "
                f"largest difference of {len(run.history)} losses {difference:.1e}",
                flush=True,
            )
        print(f"the parent of all: its ranks ended after {ended(nproc, None, folder):.1f} s")


def ended(nproc: int, victim: int | None, folder: str) -> float:
    """Seconds from the kill until no process is left."""
    free = memory(nproc)
    run, family, begun = disturbed(nproc, victim, folder, restarts=0)
    seconds = until(lambda: not any(map(lives, family)), begun)
    assert run.wait(timeout=30, check=False).status == ("lost" if victim is None else "failed")
    held = max((then - now for then, now in zip(free, memory(nproc), strict=True)), default=0)
    print(f"  {run.error or 'gone without a word'}; GPU memory not given back: {held / 2**20:.0f} MiB")
    return seconds


def restarted(nproc: int, victim: int, folder: str) -> tuple[float, Run]:
    """Seconds from the kill until the first step of the next attempt; the run, when it has finished."""
    run, _, begun = disturbed(nproc, victim, folder, restarts=1)
    seconds = until(lambda: any(event.attempt == 2 and event.type == "steps" for event in run.events), begun)
    return seconds, run.wait()


def disturbed(nproc: int, victim: int | None, folder: str, restarts: int) -> tuple[Run, list[psutil.Process], float]:
    """A run one of whose processes has just been killed; all processes it had; when that was."""
    run = launch(CONFIG, nproc, restarts=restarts, root=folder)
    until(lambda: run.progress.step >= KILL_AT, time.monotonic(), patience=300)
    attempt = launcher.Attempt.latest(run.path)
    assert attempt is not None
    parent = psutil.Process(attempt.process.pid)
    family = [parent, *parent.children(recursive=True)]
    workers = ranks(run) if nproc > 1 or restarts else {0: parent}
    os.kill((parent if victim is None else workers[victim]).pid, signal.SIGKILL)
    return run, family, time.monotonic()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memory(nproc: int) -> list[int]:
    """Free bytes of each GPU."""
    return [torch.cuda.mem_get_info(device)[0] for device in range(min(nproc, torch.cuda.device_count()))]


def until(condition: Callable[[], object], begun: float, patience: float = 60.0) -> float:
    while not condition():
        assert time.monotonic() - begun < patience, "it never came"
        time.sleep(0.02)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
