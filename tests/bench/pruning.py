"""What pruning costs on CIFAR-10: ResNet-18 cut by 30 %, 50 % and further, three seeds, beside torch-pruning's own flow.

    python -m tests.bench.pruning --folder out/pruning                     # everything, hours on a CPU, half an hour on a GPU
    CUDA_VISIBLE_DEVICES=1 python -m tests.bench.pruning --seeds 1 --stages first
    python -m tests.bench.pruning --stages report

Stages, each skipping what its folder already holds, so that they may run one by one and seeds beside each other:

* ``first``     — a ResNet-18 for each seed.
* ``baseline``  — a ResNet-18 for each seed, learning from the mean of the first ones as well: the model to prune.
* ``prune``     — the baseline pruned and tuned, learning from the same mean; each ratio on the baseline itself.
* ``peer``      — the baseline pruned as torch-pruning's CIFAR benchmark does it (group norms, globally, 400 small steps), and
  tuned as there (SGD 0.01, batch 128, decay at 60 % and 80 %), for as many epochs.
* ``report``    — test accuracy of each, the change against its baseline on the same images with its interval, the highest cut
  that holds on the held-out training images.

2,000 training images are held out from all training, to choose on; the 5,000 test images only report.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import TrainConfig, load_model, save_model, train
from workbench.compress import GradualConfig, prune_gradually
from workbench.data import DataConfig, load_batches
from workbench.models.ensemble import ensemble_of
from workbench.models.structure import count_parameters
from workbench.storage import write_atomic

CUDA = torch.cuda.is_available()
HELD_OUT = 2000
RATIOS = (0.3, 0.5, 0.8, 0.9)
PEER_RATIOS = (0.3, 0.5, 0.8)


def recipe(seed: int, epochs: int, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        data={
            "name": "cifar10",
            "batch_size": 512,
            "augment": ("reflect_crop", "flip", "cutout"),
            "holdout": HELD_OUT,
            "eval_batch_size": 500,
        },
        model={"name": "resnet18_cifar"},
        optim={"name": "sgd", "lr": 0.4},
        schedule={"warmup": 0.1},
        loss={"args": {"label_smoothing": 0.1}},
        ema=0.999,
        precision="bf16",
        compile="reduce-overhead" if CUDA else "off",
        eval_every=0,
        checkpoint={"every_epochs": 0},
        epochs=epochs,
        seed=seed,
    )
    return config.override({name.replace("__", "."): value for name, value in changes.items()})


def learning(teacher: Path) -> dict[str, Any]:
    """Settings of learning from ``teacher``: mostly its softened outputs."""
    return {
        "distill": {"teacher": str(teacher), "terms": {"soft": 0.9}, "task": 0.1, "temperature": 3.0},
        "loss__args": {},
    }


class Bench:
    """The folder of all models and results; ``seed-S/NAME`` holds a model and ``result.json``."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.small = {} if CUDA or arguments.full else {"data.limit": 4000, "model.args": {"width": 8}, "precision": "fp32"}
        limit = {} if not self.small else {"limit": 4000}
        common = {"name": "cifar10", "eval_batch_size": 500, **limit}
        self.parts = {
            "test": load_batches(DataConfig(**common)),
            "held_out": load_batches(DataConfig(**common, holdout=HELD_OUT if not self.small else 500)),
        }
        if self.small:
            self.small["data.holdout"] = 500

    def has(self, seed: int, name: str) -> bool:
        return (self.folder / f"seed-{seed}" / name / "result.json").exists()

    def model(self, seed: int, name: str) -> nn.Module:
        return load_model(self.folder / f"seed-{seed}" / name)

    def keep(self, seed: int, name: str, model: nn.Module, **facts: Any) -> None:
        place = self.folder / f"seed-{seed}" / name
        model = model.cpu().eval()
        save_model(model, place, weights_only=True)
        right = {part: correct(model, batches) for part, batches in self.parts.items()}
        result = {
            "parameters": count_parameters(model),
            **{f"{part}_right": "".join("01"[hit] for hit in hits) for part, hits in right.items()},
            **facts,
        }
        write_atomic(place / "result.json", json.dumps(result))
        shares = {part: f"{sum(hits) / len(hits):.2%}" for part, hits in right.items()}
        print(f"seed {seed} {name:<16} {result['parameters']:>10,} parameters  {shares}  {facts}", flush=True)

    def config(self, seed: int, epochs: int, **changes: Any) -> TrainConfig:
        return recipe(seed, epochs, **changes).override(self.small)

    # -- stages ---------------------------------------------------------------------------------------------------

    def first(self, seed: int) -> None:
        with tempfile.TemporaryDirectory() as root:
            self.keep(seed, "first", train(self.config(seed, self.arguments.epochs), root=root).model)

    def teacher(self) -> Path:
        place = self.folder / "teacher"
        if not (place / "structure.json").exists():
            save_model(ensemble_of([self.model(seed, "first") for seed in self.arguments.teachers]).eval(), place)
            right = correct(load_model(place), self.parts["test"])
            print(f"teacher: {sum(right) / len(right):.2%} of the test images", flush=True)
        return place

    def baseline(self, seed: int) -> None:
        config = self.config(seed + 100, self.arguments.epochs, **learning(self.teacher()))
        with tempfile.TemporaryDirectory() as root:
            self.keep(seed, "baseline", train(config, root=root).model)

    def prune(self, seed: int, ratio: float) -> None:
        steps = 1 if ratio <= 0.5 else 2
        epochs = max(1, self.arguments.tuning // steps)
        tune = self.config(seed, epochs, optim__lr=0.2, ema=0.998, **learning(self.teacher()))
        wanted = GradualConfig(ratio=ratio, steps=steps, schedule="geometric", criterion=self.arguments.criterion)
        with tempfile.TemporaryDirectory() as root:
            result = prune_gradually(self.model(seed, "baseline"), wanted, tune, torch.zeros(1, 3, 32, 32), folder=root)
            self.keep(seed, f"pruned-{ratio:g}", result.model, ratio=ratio, epochs=epochs * steps)

    def peer(self, seed: int, ratio: float) -> None:
        model = pruned_by_peer(self.model(seed, "baseline"), ratio)
        config = self.config(
            seed,
            self.arguments.tuning,
            data__batch_size=128,
            data__augment=("crop", "flip"),
            optim={"name": "sgd", "lr": 0.01, "weight_decay": 5e-4, "decay_vectors": True, "args": {"nesterov": False}},
            schedule={"name": "step", "warmup": 0.0, "milestones": (0.6, 0.8)},
            loss__args={},
            ema=0.0,
        )
        with tempfile.TemporaryDirectory() as root:
            tuned = train(config, model=model, root=root).model
        self.keep(seed, f"peer-{ratio:g}", tuned, ratio=ratio, epochs=self.arguments.tuning)

    def report(self) -> None:
        seeds = sorted(int(place.name.removeprefix("seed-")) for place in self.folder.glob("seed-*"))
        results = {
            (seed, place.parent.name): json.loads(place.read_text())
            for seed in seeds
            for place in sorted((self.folder / f"seed-{seed}").glob("*/result.json"))
        }
        for name in sorted({name for _, name in results}):
            found = {seed: results[seed, name] for seed in seeds if (seed, name) in results}
            shares = [share(result["test_right"]) for result in found.values()]
            line = f"{name:<14} {statistics.mean(shares):.2%} of the test images (seeds {', '.join(f'{s:.2%}' for s in shares)})"
            origin = {s: results[s, "baseline"] for s in found if (s, "baseline") in results}
            removed = [1 - found[s]["parameters"] / origin[s]["parameters"] for s in origin]
            if removed and max(removed) > 0.01:
                line += f"  −{statistics.mean(removed):.1%} parameters"
                for part in ("test", "held_out"):
                    pairs = [(found[s][f"{part}_right"], origin[s][f"{part}_right"]) for s in origin]
                    mean, half = change(pairs)
                    line += f"  {part} {100 * mean:+.2f} ± {100 * half:.2f}"
            print(line)


def share(right: str) -> float:
    return right.count("1") / len(right)


def change(pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Mean change over seeds on the same images, and half its 95 % interval over images (an image's seeds count as one)."""
    each = [statistics.mean(int(a[i]) - int(b[i]) for a, b in pairs) for i in range(len(pairs[0][0]))]
    return statistics.mean(each), 1.96 * statistics.stdev(each) / math.sqrt(len(each))


def correct(model: nn.Module, batches: Any) -> list[bool]:
    """For each sample whether the model is right, in full precision."""
    device = torch.device("cuda" if CUDA else "cpu")
    model = model.to(device).eval()
    right: list[bool] = []
    with torch.no_grad():
        for x, y in batches:
            right += (model(x.to(device)).argmax(1).cpu() == y.cpu()).tolist()
    model.cpu()
    return right


def pruned_by_peer(model: nn.Module, ratio: float) -> nn.Module:
    """``ratio`` of the parameters removed as torch-pruning's CIFAR benchmark removes them."""
    import torch_pruning

    x, before = torch.zeros(1, 3, 32, 32), count_parameters(model)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
    )
    while count_parameters(model) > (1 - ratio) * before:
        pruner.step()
    del model.structure  # it is no longer what its name builds
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/pruning"))
    parser.add_argument("--stages", nargs="+", default=["first", "baseline", "prune", "peer", "report"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--teachers", nargs="+", type=int, default=[0, 1, 2], help="seeds whose first models are the teacher")
    parser.add_argument("--ratios", nargs="+", type=float, help="by default those of the stage")
    parser.add_argument("--epochs", type=int, default=120 if CUDA else 1)
    parser.add_argument("--tuning", type=int, default=40 if CUDA else 2, help="epochs of tuning after pruning, in all")
    parser.add_argument("--criterion", default="l1")
    parser.add_argument("--full", action="store_true", help="on a CPU too: all the data, the whole width")
    arguments = parser.parse_args()
    bench = Bench(arguments.folder, arguments)
    for stage in arguments.stages:
        if stage == "report":
            bench.report()
            continue
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            if stage in ("first", "baseline"):
                if not bench.has(seed, stage):
                    getattr(bench, stage)(seed)
                continue
            for ratio in arguments.ratios or (RATIOS if stage == "prune" else PEER_RATIOS):
                if not bench.has(seed, f"{'pruned' if stage == 'prune' else 'peer'}-{ratio:g}"):
                    getattr(bench, stage)(seed, ratio)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    main()
