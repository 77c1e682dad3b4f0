"""A model that doesn't fit one GPU with its optimizer: what one GPU says of it, and how it trains on several.

    python -m tests.bench.large [--ranks 2] [--layers 44] [--steps 12] [--only one | many] [--out FILE]

A text encoder of BERT's kind, 4,096 wide: 44 layers have 9 billion parameters, 134 GiB with gradients and AdamW's state. On one
GPU the run has to fail in words; on several, weights, gradients and state are spread over all (FSDP2), and blocks compute their
activations twice. Sequences of 512 random tokens in bf16. Reported: parameters, seconds of a step, tokens per second, what 6
operations a parameter and token are of a GPU's bf16 peak (:data:`PEAK`), and each rank's memory. The run is ended without a
checkpoint, of over 100 GB. On a CPU sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from workbench import Run, TrainConfig, launch
from workbench.events import AttemptStarted, Steps

CUDA = torch.cuda.is_available()
WIDTH, LENGTH, BATCH = (4096, 512, 8) if CUDA else (32, 16, 2)
"""BATCH: sequences a rank."""
PEAK = 989e12
"""Operations per second of an H100 or H200 in dense bf16 (NVIDIA's data sheets)."""
FIRST = 4
"""Steps that don't count."""


def config(ranks: int, layers: int) -> TrainConfig:
    texts = {"name": f"{Path(__file__).with_name('training.py')}:texts", "args": {"count": 4096, "length": LENGTH}}
    size = {"layers": layers, "width": WIDTH, "heads": max(2, WIDTH // 128), "length": LENGTH}
    return TrainConfig(
        data=texts | {"batch_size": BATCH * ranks},
        model={"name": "bert_base", "args": size},
        optim={"name": "adamw", "lr": 1e-5},
        precision="bf16",
        mesh={"shard": ranks},
        memory={"recompute": 1.0},
        epochs=1000,
        eval_every=0,
        checkpoint={"every_epochs": 0},
        log_every=1,
        probes={"memory": {"every": 5}},
    )


def trained(run: Run, steps: int, patience: float = 500.0) -> dict[str, Any]:
    """What ``run`` does in so many steps; then it is ended."""
    latest = time.monotonic() + patience
    while run.progress.step < steps and run.status in ("created", "starting", "running"):
        if time.monotonic() > latest:
            break
        time.sleep(0.5)
    told = [event for event in run.events if isinstance(event, Steps)]
    started = next((event for event in run.events if isinstance(event, AttemptStarted)), None)
    status, error, ranks = run.status, run.error, run.config.mesh.shard
    memory = run.readings("memory")
    run.kill()
    found = {"status": status, "error": error, "parameters": started.parameters if started else None}
    between = [later.time - sooner.time for sooner, later in zip(told[FIRST:], told[FIRST + 1 :], strict=False)]
    if between:
        seconds = statistics.median(between)
        tokens = BATCH * ranks * LENGTH / seconds
        found |= {"seconds": seconds, "tokens_per_s": tokens, "loss": [event.loss[-1] for event in told]}
        found["of_peak"] = 6 * found["parameters"] * tokens / ranks / PEAK if found["parameters"] else None
        found["GiB"] = {str(rank): peak / 2**30 for rank, peak in memory.groupby("rank")["peak"].max().items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--layers", type=int, default=44 if CUDA else 2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=("one", "many"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for ranks in (1, arguments.ranks):
            if arguments.only and arguments.only != ("one" if ranks == 1 else "many"):
                continue
            found[ranks] = trained(launch(config(ranks, arguments.layers), ranks, root=root), arguments.steps)
            print(f"{ranks} GPU(s): {json.dumps(found[ranks])}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
