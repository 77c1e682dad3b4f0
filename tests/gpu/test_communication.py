"""Ways of exchanging gradients against the exact mean over NCCL, step times without waiting, shares that follow speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench import TrainConfig, launch, train
from workbench.data.batches import Batches, Target
from workbench.data.config import DataConfig
from workbench.data.order import Shard
from workbench.data.splits import load_splits
from workbench.training.balance import SETTING
from workbench.training.clock import StepClock
from workbench.training.device_time import mark, marked
from workbench.training.objective import Objective
from workbench.training.parallel import Parallel

TRAINING = Path(__file__).parents[1] / "training"


@pytest.mark.parametrize("within", [False, True])
def test_a_step_is_timed_without_waiting_for_the_device(within: bool) -> None:
    """By events after the backward pass, and by the device's own clock within it."""
    batches = Batches(load_splits(DataConfig(limit=64)), DataConfig(batch_size=32), Shard(), Target(torch.device("cuda")), 0)
    parallel = Parallel(Objective(nn.Linear(4096, 4096).cuda(), nn.CrossEntropyLoss()))
    parallel.payload, parallel.marked = 4, marked(torch.device("cuda", 0)) if within else None
    clock, model = StepClock(torch.device("cuda"), batches, parallel), parallel.objective.model
    x = torch.randn(4096, 4096, device="cuda")
    model(x).square().mean().backward()
    torch.cuda.synchronize()
    timings = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            clock.watch(model(x).square().mean()).backward()
            if within:
                mark(x[:1])
            timings.append(clock.gathered())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert timings[0] is None
    for timing in timings[1:]:
        assert timing is not None and timing.arrived()
        assert 1e-4 < timing.busy < 1 and 0 <= timing.exposed < timing.busy and timing.payload == 4


def test_a_device_that_has_done_all_it_was_given_is_idle() -> None:
    batches = Batches(load_splits(DataConfig(limit=64)), DataConfig(batch_size=32), Shard(), Target(torch.device("cuda")), 0)
    x = torch.randn(8192, 8192, device="cuda")
    for done in (True, False):
        clock = StepClock(torch.device("cuda"), batches, Parallel(Objective(nn.Linear(1, 1).cuda(), nn.CrossEntropyLoss())))
        for _ in range(5):
            clock.begin()
            for _ in range(10):
                x @ x
            clock.end()
            if done:
                torch.cuda.synchronize()
        assert clock.idle == float(done)


@pytest.mark.gpu(2)
def test_each_exchange_is_as_near_the_mean_over_nccl_as_over_gloo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = {"EXCHANGE_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*command, str(TRAINING / "exchange.py"), str(tmp_path / "found.json")],
        env=os.environ | more,
        timeout=280,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for rank in json.loads((tmp_path / "found.json").read_text()):
        compared: dict[str, Any] = rank["compare"]
        for exact in ("whole", "small buckets", "powersgd, exact steps"):
            assert compared[exact]["distance"] < 1e-6
        assert 0 < compared["bf16"]["distance"] < 2**-8
        for name, apart in {"small buckets": 1e-4, "whole": 1e-4, "bf16": 2**-7}.items():
            captured = rank["compiled"][name]
            assert captured["names"] and captured["way"] == "CompiledReplicas" and captured["distance"] < apart
        assert 0 < compared["powersgd 16"]["distance"] < compared["powersgd 4"]["distance"] < 1
        assert rank["kept"]["apart"] < 1e-12 and rank["kept"]["goes on"] and rank["recovered"] < 1e-9
        assert rank["measured"]["unchanged"] and rank["measured"]["reused"]


@pytest.mark.gpu(2)
def test_shares_follow_speed_on_two_gpus(tmp_path: Path) -> None:
    """Rank 1 computes everything eight times; losses are those of one process, and step times are read."""
    config = TrainConfig(
        data={"name": "digits", "limit": 1024, "batch_size": 512, "augment": ()},
        model={"name": f"{TRAINING / 'net.py'}:slowed_net", "args": {"rank": 1, "times": 8, "width": 256}},
        optim={"name": "sgd", "lr": 0.01},
        epochs=40,
        device="cuda",
        precision="fp32",
        log_every=20,
        eval_every=0,
        probes={"communication": {"every": 5}},
    )
    alone = train(config, root=tmp_path).run
    run = launch(config.override({"balance.shares": "speed", "balance.every": 10}), nproc=2, root=tmp_path).wait(timeout=240)
    sizes = run.resolved[SETTING]["value"]
    assert sum(sizes) == 512 and sizes[0] > 2 * sizes[1]
    np.testing.assert_allclose(run.history["loss"], alone.history["loss"], rtol=1e-3)
    times = run.readings("communication")
    known = times[times["busy"].notna()].set_index(["step", "rank"])
    even, late = known.loc[5:10].groupby("rank")["busy"].median(), known.loc[60:].groupby("rank")["busy"].median()
    assert even[1] > 2 * even[0] and late[1] < 1.5 * late[0]
    assert (times["bandwidth"] > 1e9).all() and set(times["link"]) != {""}
