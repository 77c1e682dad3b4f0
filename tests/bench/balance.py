"""One rank slowed three times: step time with equal shares, with shares that follow speed, and the ideal.

    python -m tests.bench.balance [--times 3] [--rounds 3] [--out FILE]

Two ranks train one multilayer perceptron; the second computes its forward and backward pass ``times`` over, a real slow-down
in proportion to its samples, and the same gradients. The ideal is what these two could do without waiting for one another:
batch / (rate + rate), of two runs of one process at the same time, each of half the batch. Equal shares and balanced ones
take turns; the figures are medians. Losses are held against those of one process. With two CUDA devices the ranks are on
these, else on the CPU's cores, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.training.net import Slowed
from workbench import Run, TrainConfig, launch, train
from workbench.data.splits import Arrays, Splits
from workbench.events import Steps

CUDA = torch.cuda.device_count() > 1
BATCH, WIDTH = (8192, 8192) if CUDA else (2048, 512)
"""So large a batch that the exchange of gradients, which on a CPU takes from the same cores, is little beside it."""
STEPS = 200 if CUDA else 120


def samples(count: int = 0) -> Splits:
    """Points of ten classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(max(count, 20 * BATCH)) % 10
    x = torch.randn(10, 64, generator=generator)[y] + torch.randn(len(y), 64, generator=generator)
    return Splits(Arrays(x, y), Arrays(x[:64], y[:64]), classes=tuple(map(str, range(10))))


def perceptron(num_classes: int = 10, width: int = WIDTH, slow: int = 1, times: int = 1) -> nn.Module:
    """[N, 64] -> logits [N, num_classes]; slowed in the rank ``slow``."""
    layers: list[nn.Module] = [nn.Linear(64, width)]
    for _ in range(4):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(Slowed(nn.Sequential(*layers), slow, times), nn.ReLU(), nn.Linear(width, num_classes))


def config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        data={"name": f"{__file__}:samples", "batch_size": BATCH},
        model={"name": f"{__file__}:perceptron"},
        optim={"name": "sgd", "lr": 0.02},
        epochs=1000,
        max_steps=STEPS,
        eval_every=0,
        checkpoint={"every_epochs": 0},
        device="cuda" if CUDA else "cpu",
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


def step_time(run: Run) -> float:
    """Median seconds of a step over the second half of the run."""
    batch = run.config.data.batch_size
    told = [
        event for event in run.events if isinstance(event, Steps) and event.step > run.progress.step // 2 and event.samples_per_s
    ]
    return statistics.median(batch / event.samples_per_s for event in told if event.samples_per_s)


def apart(place: int, factor: int, root: str) -> Run:
    """Half the batch on a process of its own, as long as the other one; returns at once."""
    half = config(data__batch_size=BATCH // 2, **{"model.args": {"slow": 0, "times": factor}})
    if factor == 1:
        half = half.override({"max_steps": 3 * STEPS})  # the slower one needs its company to the end
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    try:
        return launch(half, root=root)
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3 if CUDA else 1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    slowed: dict[str, Any] = {"model.args": {"times": arguments.times}}
    times: dict[str, list[float]] = {name: [] for name in ("even", "speed", "fast apart", "slow apart")}
    with tempfile.TemporaryDirectory() as root:
        reference = train(config(), root=root).run.history["loss"]
        for _ in range(arguments.rounds):
            for shares in ("even", "speed"):
                run = launch(config(**slowed, balance__shares=shares), nproc=2, root=root).wait()
                times[shares].append(step_time(run))
                difference = float((run.history["loss"] - reference).abs().max())
                said = run.resolved.get("balance.sizes", {}).get("value", "equal")
                print(f"{shares:<6} {1000 * times[shares][-1]:8.2f} ms a step, shares {said}, losses differ by {difference:.1e}")
            both = [apart(place, factor, root) for place, factor in enumerate((1, arguments.times))]
            for name, run in zip(("fast apart", "slow apart"), both, strict=True):
                times[name].append(step_time(run.wait()))
    even, speed, fast, slow = (statistics.median(found) for found in times.values())
    ideal = BATCH / (BATCH / 2 / fast + BATCH / 2 / slow)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{device}, torch {torch.__version__}, one of two ranks {slow / fast:.2f} × slower")
    print(f"even {1000 * even:.2f} ms, by speed {1000 * speed:.2f} ms ({even / speed:.2f} × faster), ideal {1000 * ideal:.2f} ms")
    print(f"by speed / ideal: {speed / ideal:.3f}; even / ideal: {even / ideal:.3f}")
    if arguments.out:
        arguments.out.write_text(json.dumps({**times, "ideal": ideal}, indent=1))


if __name__ == "__main__":
    main()
