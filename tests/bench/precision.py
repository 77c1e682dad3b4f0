"""What each precision costs and gives: time a step, peak memory and final accuracy of ResNet-18 on CIFAR-10.

    python -m tests.bench.precision [--epochs 30] [--precisions fp32 tf32 fp16 bf16] [--compile off reduce-overhead] [--out FILE]

One recipe and one seed for all. Time is that of the fastest window of steps after the first epoch, memory the allocator's peak,
accuracy that of the 5,000 test images. On a CPU the sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from workbench import TrainConfig, train
from workbench.events import Steps

CUDA = torch.cuda.is_available()
PRECISIONS = ("fp32", "tf32", "fp16", "bf16") if CUDA else ("fp32", "bf16")


def measured(precision: str, mode: str, epochs: int) -> dict[str, Any]:
    """Milliseconds a step, GiB at the peak (on a GPU), accuracy."""
    batch = 512 if CUDA else 64
    config = TrainConfig(
        data={"name": "cifar10", "batch_size": batch, "augment": ("crop", "flip"), "limit": None if CUDA else 640},
        model={"name": "resnet18_cifar", "args": {} if CUDA else {"width": 8}},
        optim={"name": "sgd", "lr": 0.2},
        schedule={"warmup": 0.1},
        precision=precision,
        compile=mode,
        epochs=epochs,
        eval_every=0,
        checkpoint={"every_epochs": 0},
        log_every=10 if CUDA else 2,
    )
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as root:
        result = train(config, root=root)
        windows = [event for event in result.run.events if isinstance(event, Steps) and event.epoch > 1 and event.samples_per_s]
        return {
            "ms": 1000 * batch / max(event.samples_per_s or 0 for event in windows),
            "gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
            "accuracy": result.metrics["accuracy"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30 if CUDA else 2)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--compile", nargs="+", default=["off", "reduce-overhead"] if CUDA else ["off"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {arguments.epochs} epochs", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for mode in arguments.compile:
        for precision in arguments.precisions:
            torch._dynamo.reset()
            row = found[f"{precision}, compile={mode}"] = measured(precision, mode, arguments.epochs)
            first = next(iter(found.values()))
            memory = f"{row['gib']:6.2f} GiB ({row['gib'] / first['gib']:.2f})" if row["gib"] else ""
            print(
                f"{precision:<5} compile={mode:<16} {row['ms']:8.2f} ms ({first['ms'] / row['ms']:.2f} × as fast)  {memory}  "
                f"accuracy {row['accuracy']:.2%} ({100 * (row['accuracy'] - first['accuracy']):+.2f})",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
