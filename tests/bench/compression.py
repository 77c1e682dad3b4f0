"""From training to INT8: accuracy, parameters, file size and latency of baseline, pruned and quantized models.

    python -m tests.bench.compression --data digits
    python -m tests.bench.compression --data cifar10 --folder out/cifar10

Trains, prunes 30 % of the parameters, fine-tunes and keeps the models in ``--folder`` (a GPU pays here); then quantizes and
compares on the CPU. ``--stage`` does one part, so that each may run where it is at home.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from workbench import PruneConfig, QuantConfig, TrainConfig, compare, load_model, prune, quantize, save_model, train
from workbench.comparison import CompareConfig
from workbench.data import DataConfig, load_batches

CONFIGS = {
    "digits": TrainConfig(
        data={"name": "digits", "batch_size": 64, "augment": ["shift"]},
        model={"name": "resnet20"},
        optim={"name": "sgd", "lr": 0.1},
        epochs=12,
    ),
    "cifar10": TrainConfig(
        data={"name": "cifar10", "batch_size": 512, "augment": ["reflect_crop", "flip", "cutout"]},
        model={"name": "resnet18_cifar"},
        optim={"name": "sgd", "lr": 0.4},
        schedule={"warmup": 0.1},
        loss={"args": {"label_smoothing": 0.1}},
        ema=0.999,
        epochs=160,
        precision="auto",
        compile="auto",
        eval_every=10,
        checkpoint={"every_epochs": 0},
    ),
}
TUNING = {
    "digits": {"epochs": 6, "optim.lr": 0.02, "label": "digits-tuned"},
    "cifar10": {"epochs": 20, "optim.lr": 0.1, "label": "cifar10-tuned"},
}


def train_baseline(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as runs:
        baseline = train(CONFIGS[name], root=runs)
        print(f"baseline: {baseline.metrics}", flush=True)
        save_model(baseline.model.cpu(), folder / "baseline")


def prune_and_tune(name: str, folder: Path, epochs: int | None) -> None:
    config = CONFIGS[name].override(TUNING[name] | ({"epochs": epochs} if epochs else {}))
    if not torch.cuda.is_available():
        config = config.override({"precision": "bf16" if name == "cifar10" else "fp32"})
    with tempfile.TemporaryDirectory() as runs:
        pruned = prune(load_model(folder / "baseline"), PruneConfig(ratio=0.3))
        tuned = train(config, model=pruned, root=runs)
        print(f"pruned, tuned for {config.epochs} epochs: {tuned.metrics}", flush=True)
        save_model(tuned.model.cpu(), folder / "pruned")


def quantize_and_compare(name: str, folder: Path, limit: int | None) -> None:
    data = DataConfig(**(CONFIGS[name].data.model_dump() | {"eval_batch_size": 250, "augment": []}))
    held_out = load_batches(data)[: limit and max(1, limit // 250)]
    to_calibrate = load_batches(DataConfig(**(data.model_dump() | {"limit": 1024})), "train")
    variants = {part: load_model(folder / part) for part in ("baseline", "pruned") if (folder / part).exists()}
    for part in list(variants):
        variants[f"{part} INT8"] = quantize(variants[part], QuantConfig(mode="static", calibration_samples=512), to_calibrate)
        save_model(variants[f"{part} INT8"], folder / f"{part}-int8")
    result = compare(variants, held_out, CompareConfig(seconds=60))
    print(result)
    result.to_html(folder / "comparison.html")
    result.frame().to_csv(folder / "comparison.csv", index=False)
    print(f"The page lies in {folder / 'comparison.html'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=sorted(CONFIGS), default="digits")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage", choices=["all", "train", "prune", "compare"], default="all")
    parser.add_argument("--tuning-epochs", type=int, help="epochs after pruning, by default the recipe's")
    parser.add_argument("--limit", type=int, help="held-out samples to compare on, by default all")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder = arguments.folder or Path("out") / f"compression-{arguments.data}"
    if arguments.stage in ("all", "train"):
        train_baseline(arguments.data, folder)
    if arguments.stage in ("all", "prune"):
        prune_and_tune(arguments.data, folder, arguments.tuning_epochs)
    if arguments.stage in ("all", "compare"):
        quantize_and_compare(arguments.data, folder, arguments.limit)


if __name__ == "__main__":
    main()
