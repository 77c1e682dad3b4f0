"""What each precision costs and gives on CIFAR-10: time a step, peak memory and final accuracy.

    python -m tests.bench.precision [--jobs resnet18 vit] [--epochs 4] [--precisions fp32 tf32 fp16 bf16 fp8]
                                    [--compile off reduce-overhead] [--out FILE]

* ``resnet18`` — batch 512, SGD, in fp32, tf32, fp16 and bf16, eager and captured.
* ``vit``      — a vision transformer of width 1024, 8 blocks, 4×4 patches: 65 tokens of each of 256 images, 16,640 rows a linear
  layer; AdamW; in bf16 and, where the GPU has it, FP8, captured.

One recipe and one seed for all precisions. Time is that of the fastest window of steps after the first epoch, memory the
allocator's peak, accuracy that of the 5,000 test images. Four epochs, the rate rising for a tenth of them and falling to zero,
tell precisions apart and should keep all of it under five minutes on an H200. They are no recipe for the best accuracy: that is
``--epochs 30`` and more. On a CPU the sizes shrink, FP8 is emulated, and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench import TrainConfig, train
from workbench.events import Steps
from workbench.training import fp8

CUDA = torch.cuda.is_available()
CAPTURED = "reduce-overhead" if CUDA else "off"


@dataclass(frozen=True)
class Job:
    """What is trained, in which precisions and modes of torch.compile."""

    config: Callable[[], TrainConfig]
    precisions: tuple[str, ...]
    modes: tuple[str, ...]


def recipe(batch: int, limit: int, **changes: Any) -> TrainConfig:
    return TrainConfig(
        data={"name": "cifar10", "batch_size": batch, "augment": ("crop", "flip"), "limit": None if CUDA else limit},
        schedule={"warmup": 0.1},
        eval_every=0,
        checkpoint={"every_epochs": 0},
        log_every=10 if CUDA else 2,
        **changes,
    )


def resnet18() -> TrainConfig:
    model = {"name": "resnet18_cifar", "args": {} if CUDA else {"width": 8}}
    return recipe(512 if CUDA else 64, 640, model=model, optim={"name": "sgd", "lr": 0.2})


def vit() -> TrainConfig:
    sizes = {"depth": 8, "patch_size": 4} if CUDA else {"depth": 2, "patch_size": 8, "embed_dim": 64, "num_heads": 4}
    model = {"name": "vit_large_patch16_224", "args": {"img_size": 32, **sizes}}
    optim = {"name": "adamw", "lr": 3e-4, "weight_decay": 0.05}
    return recipe(256 if CUDA else 32, 128, model=model, optim=optim, clip={"mode": "fixed", "max_norm": 1.0})


MODES = ("off", CAPTURED) if CUDA else ("off",)
JOBS = {
    "resnet18": Job(resnet18, ("fp32", "tf32", "fp16", "bf16") if CUDA else ("fp32", "bf16"), MODES),
    "vit": Job(vit, ("bf16", "fp8"), (CAPTURED,)),
}


def measured(config: TrainConfig) -> dict[str, Any]:
    """Milliseconds a step, GiB at the peak (on a GPU), accuracy, and which layers computed in FP8."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as root:
        result = train(config, root=root)
        windows = [event for event in result.run.events if isinstance(event, Steps) and event.epoch > 1 and event.samples_per_s]
        return {
            "ms": 1000 * config.data.batch_size / max(event.samples_per_s or 0 for event in windows),
            "gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
            "accuracy": result.metrics["accuracy"],
            "fp8": result.run.resolved.get("fp8", {}).get("reason", ""),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--epochs", type=int, default=4 if CUDA else 2)
    parser.add_argument("--precisions", nargs="+", help="by default each job's own")
    parser.add_argument("--compile", nargs="+", help="by default each job's own")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not CUDA:
        os.environ.setdefault(fp8.EMULATED, "emulate")
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {arguments.epochs} epochs", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.jobs:
        job, first = JOBS[name], None
        for mode in arguments.compile or job.modes:
            for precision in arguments.precisions or job.precisions:
                missing = fp8.lacking(torch.device("cuda" if CUDA else "cpu")) if precision == "fp8" else None
                if missing is not None:
                    print(f"{name:<9} fp8   skipped: it takes compute capability 8.9, and {missing}", flush=True)
                    continue
                torch._dynamo.reset()
                changes = {"precision": precision, "compile": mode, "epochs": arguments.epochs}
                row = found[f"{name} {precision}, compile={mode}"] = measured(job.config().override(changes))
                first = first or row
                memory = f"{row['gib']:6.2f} GiB ({row['gib'] / first['gib']:.2f})" if row["gib"] else ""
                print(
                    f"{name:<9} {precision:<5} compile={mode:<16} {row['ms']:8.2f} ms ({first['ms'] / row['ms']:.2f} × as fast)  "
                    f"{memory}  accuracy {row['accuracy']:.2%} ({100 * (row['accuracy'] - first['accuracy']):+.2f})",
                    flush=True,
                )
                if row["fp8"]:
                    print(f"          {row['fp8']}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
