"""Largest batch in the same memory, and what it costs: plain training, recomputed blocks, a budget, main memory.

    python -m tests.bench.memory [--budget 40] [--models bert_large resnet152] [--out FILE]

BERT-large on 128 tokens and ResNet-152 on 224² images, AdamW, bf16. For each way of saving memory: the largest batch whose real
step stays under the budget, how far off its prediction was, and the time a sample, of the faster of two steps. Then what
``memory.optimizer`` chooses for twice, and for four times, the largest batch of plain training. On a CPU sizes shrink and the
figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench import memory
from workbench.errors import MemoryExhausted
from workbench.losses import LossConfig, make_loss
from workbench.memory import MemoryConfig
from workbench.models import ModelConfig, build_model
from workbench.optim_config import OptimConfig
from workbench.training.objective import Objective
from workbench.training.trial import Setting, Trial

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PRECISION = "bf16" if CUDA else "fp32"
BUDGET = 40.0 if CUDA else 0.1
"""GiB."""

WAYS = {"plain": MemoryConfig(), "half the blocks": MemoryConfig(recompute=0.5), "all blocks": MemoryConfig(recompute=1.0)}
if CUDA:
    WAYS |= {
        "optimizer in main memory": MemoryConfig(offload="optimizer"),
        "activations in main memory": MemoryConfig(offload="activations"),
        "all blocks, both in main memory": MemoryConfig(recompute=1.0, offload="both"),
    }


def bert_large() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    size = {"layers": 24, "width": 1024, "heads": 16} if CUDA else {"layers": 4, "width": 64, "heads": 4, "vocab_size": 1000}
    length, words = (128, 30522) if CUDA else (32, 1000)
    model = build_model(ModelConfig(name="bert_base", num_classes=2, args=size))
    ids = torch.randint(1, words, (64, length), generator=torch.Generator().manual_seed(0))
    return model, (ids, torch.arange(64) % 2)


def resnet152() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    name, side, classes = ("resnet152", 224, 1000) if CUDA else ("resnet20", 32, 10)
    model = build_model(ModelConfig(name=name, num_classes=classes, in_channels=3)).to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, side, side, generator=torch.Generator().manual_seed(0))
    return model, (images.to(memory_format=torch.channels_last), torch.arange(64) % classes)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]] = {"bert_large": bert_large, "resnet152": resnet152}


def timed(model: nn.Module, data: tuple[Tensor, Tensor], samples: int, way: MemoryConfig) -> float:
    """Seconds of a step."""
    trial = Trial(Objective(model, make_loss(LossConfig())), data, OptimConfig())
    with trial.unchanged():
        cost = trial.measure(samples, Setting(PRECISION, way), timed=True)
    assert cost is not None
    return cost.seconds


def measure(name: str, budget: float) -> list[dict[str, Any]]:
    """A row for each way, then for each choice."""
    model, data = MODELS[name]()
    model.to(DEVICE)
    data = (data[0].to(DEVICE), data[1].to(DEVICE))
    rows: list[dict[str, Any]] = []
    for label, way in WAYS.items():
        found = memory.largest_batch(model, budget, data=data, precision=PRECISION, memory=way)
        seconds = timed(model, data, found.samples, way)
        rows.append(
            {
                "model": name,
                "way": label,
                "batch": found.samples,
                "peak_gib": (found.measured or 0) / 2**30,
                "prediction_off": found.error,
                "ms_a_sample": 1e3 * seconds / found.samples,
            }
        )
        print(row_text(rows[-1], rows[0]), flush=True)
    for factor in (2, 4):
        batch = factor * rows[0]["batch"]
        rows_of = torch.arange(batch, device=DEVICE) % len(data[0])
        try:
            choice = memory.optimizer(model, budget, data=(data[0][rows_of], data[1][rows_of]), precision=PRECISION)
        except MemoryExhausted as error:
            print(f"{name:12} chosen for {batch}: {error}")
            continue
        chosen = next(tried for tried in choice.tried if tried.memory == choice.memory)
        assert chosen.measured is not None
        rows.append(
            {
                "model": name,
                "way": f"chosen for {factor} × plain: {choice.overrides}",
                "batch": batch,
                "peak_gib": chosen.measured.peak / 2**30,
                "prediction_off": chosen.predicted / chosen.measured.peak - 1,
                "ms_a_sample": 1e3 * chosen.measured.seconds / batch,
                "reason": choice.reason,
            }
        )
        print(row_text(rows[-1], rows[0]), choice.reason, sep="\n    ", flush=True)
    return rows


def row_text(row: dict[str, Any], plain: dict[str, Any]) -> str:
    return (
        f"{row['model']:12} {row['way']:34} batch {row['batch']:6} ({row['batch'] / plain['batch']:5.2f} ×), "
        f"{row['peak_gib']:7.3f} GiB (prediction {row['prediction_off']:+.1%}), {row['ms_a_sample']:8.3f} ms a sample "
        f"({row['ms_a_sample'] / plain['ms_a_sample']:5.2f} ×)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET, help="GiB of a step at its peak")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'cpu'}, torch {torch.__version__}, {arguments.budget:g} GiB, {PRECISION}")
    rows = [row for name in arguments.models for row in measure(name, arguments.budget)]
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
