"""What INT8 costs MobileNetV3 on CIFAR-10: after-training quantization by several observers, mixed precision, training for it.

    python -m tests.bench.mobilenet --stages train qat --full        # minutes on a GPU
    python -m tests.bench.mobilenet --stages evaluate latency report --full   # on a CPU
    python -m tests.bench.mobilenet                                  # all of it at toy size: shows that it runs

Stages, each skipping what its folder already holds:

* ``train``    — MobileNetV3-Large from scratch, on images scaled to 64². ``--seconds`` takes as many epochs as fit.
* ``qat``      — that model fine-tuned with INT8's rounding, learning from itself in floating point.
* ``evaluate`` — INT8 by each observer, in mixed precision and from ``qat``; ``plain`` without equalizing channels or correcting
  biases. Each compiled, right or wrong on each image.
* ``latency``  — of all compiled forms, in turns.
* ``report``   — accuracy, its change against fp32 on the same images with its interval, file size, latency.

2,000 training images are held out from all training: INT8 is calibrated on some of them, and which layers stay in floating point
is chosen on all; the 5,000 test images only report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench import QuantConfig, TrainConfig, load_model, quantize, save_model, train
from workbench.artefact import size_on_disk
from workbench.comparison.intervals import paired_difference
from workbench.compress import QuantAwareTraining, compiled, mixed_precision
from workbench.compress.latency import latency_of, ratio_of
from workbench.data import load_batches
from workbench.models.structure import structure_of
from workbench.storage import write_atomic

CUDA = torch.cuda.is_available()
OBSERVERS = ("auto", "minmax", "moving_average", "percentile", "entropy")
CALIBRATION = 512
ALLOWED = 0.005
"""Accuracy that mixed precision may lose on the held-out images: half of what is allowed in all."""


def recipe(full: bool) -> TrainConfig:
    return TrainConfig(
        data={
            "name": "cifar10",
            "resize": 64 if full else 32,
            "batch_size": 512 if full else 128,
            "eval_batch_size": 250,
            "augment": ("reflect_crop", "flip"),
            "holdout": 2000 if full else 500,
            "limit": None if full else 2000,
        },
        model={"name": "mobilenetv3_large_100" if full else "mobilenetv3_small_050"},
        optim={"name": "sgd", "lr": 0.4 if full else 0.1},
        schedule={"warmup": 0.1},
        loss={"args": {"label_smoothing": 0.1}},
        ema=0.999,
        epochs=60 if full else 2,
        precision="bf16" if CUDA else "fp32",
        compile="reduce-overhead" if CUDA else "off",
        eval_every=0,
        checkpoint={"every_epochs": 0},
        probes={kind: {"every": 0} for kind in ("gradients", "activations", "memory", "communication")},
    )


def tuning(config: TrainConfig, teacher: Path, epochs: int) -> TrainConfig:
    """Settings of training for INT8: small steps, mostly from the softened outputs of the model in floating point."""
    return config.override(
        {
            "optim.lr": config.optim.lr / 20,
            "epochs": epochs,
            "ema": 0.99,
            "precision": "tf32" if CUDA else "fp32",
            "compile": "off",
            "distill": {"teacher": str(teacher), "terms": {"soft": 0.9}, "task": 0.1, "temperature": 3.0},
            "loss.args": {},
        }
    )


class Bench:
    """The folder of all models and results: ``NAME/`` holds a model and, once evaluated, ``result.json``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = Path(arguments.folder), arguments
        self.config = recipe(arguments.full)
        self.side = self.config.data.resize or 32

    def model(self, name: str) -> nn.Module:
        return load_model(self.folder / name).eval()

    def trained(self, name: str, config: TrainConfig, model: nn.Module | None = None) -> None:
        with tempfile.TemporaryDirectory() as root:
            result = train(config, model=model, root=root)
            rate = result.run.history["samples_per_s"].dropna().median()
            save_model(result.model.cpu().eval(), self.folder / name)
        print(f"{name}: {config.epochs} epochs, {rate:,.0f} images/s, on held-out images {result.metrics}", flush=True)

    # -- stages -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        if not (self.folder / "fp32" / "structure.json").exists():
            self.trained("fp32", self.config.override({"epochs": self.epochs()}))

    def epochs(self) -> int:
        """As told, or as many as fit in ``--seconds``, by the rate of a short run."""
        if self.arguments.seconds is None:
            return int(self.arguments.epochs or self.config.epochs)
        with tempfile.TemporaryDirectory() as root:
            run = train(self.config.override({"epochs": 2}), root=root).run
        rate = run.history["samples_per_s"].dropna().tail(5).median()
        epochs = max(3, int(self.arguments.seconds * rate / (50000 - self.config.data.holdout)))
        print(f"{rate:,.0f} images/s: {epochs} epochs", flush=True)
        return epochs

    def qat(self) -> None:
        if (self.folder / "qat" / "structure.json").exists():
            return
        x = torch.zeros(2, 3, self.side, self.side)
        prepared = QuantAwareTraining(self.model("fp32"), QuantConfig(mode="qat"), x).prepare()
        epochs = self.arguments.tuning or (10 if self.arguments.full else 1)
        self.trained("qat", tuning(self.config, self.folder / "fp32", epochs), prepared)

    def evaluate(self) -> None:
        held_out = load_batches(self.config.data)
        parts = {"held_out": held_out, "test": load_batches(self.config.data.override({"holdout": 0}))}
        model, static = self.model("fp32"), QuantConfig(calibration_samples=CALIBRATION)
        makers: dict[str, Callable[[], nn.Module]] = {"fp32": lambda: model, "bf16": lambda: model}
        plain = static.override({"equalize": False, "correct_bias": False})
        for observer in OBSERVERS:
            makers[f"int8-{observer}"] = partial(quantize, model, static.override({"observer": observer}), held_out)
        makers["int8-plain"] = lambda: quantize(model, plain, held_out)
        makers["int8-mixed"] = lambda: mixed_precision(model, static, held_out, max_loss=ALLOWED)
        makers["int8-plain-mixed"] = lambda: mixed_precision(model, plain, held_out[:2], max_loss=0.0)
        if (self.folder / "qat").exists():
            makers["int8-qat"] = lambda: quantize(self.model("qat"))
        for name, make in makers.items():
            wanted = not self.arguments.variants or name in self.arguments.variants
            if wanted and not (self.folder / name / "result.json").exists():
                self.keep(name, make(), parts)

    def keep(self, name: str, model: nn.Module, parts: dict[str, Any]) -> None:
        if not (self.folder / name / "structure.json").exists():
            save_model(model, self.folder / name)
        fast = self.compiled(name)
        right = {part: correct(fast, batches) for part, batches in parts.items()}
        record = structure_of(model).transforms[-1:]
        result = {
            "bytes": size_on_disk(self.folder / name),
            "kept": record[0]["config"]["keep_float"] if record else [],
            **{f"{part}_right": "".join("01"[hit] for hit in hits) for part, hits in right.items()},
        }
        write_atomic(self.folder / name / "result.json", json.dumps(result))
        print(f"{name:<20}", {part: f"{statistics.mean(hits):.2%}" for part, hits in right.items()}, flush=True)

    def compiled(self, name: str) -> nn.Module:
        """The model as it was saved, compiled."""
        return compiled(self.model(name), torch.bfloat16 if name == "bf16" else torch.float32)

    def results(self) -> dict[str, dict[str, Any]]:
        places = sorted(self.folder.glob("*/result.json"), key=lambda place: place.stat().st_mtime)
        return {place.parent.name: json.loads(place.read_text()) for place in places}

    def latency(self) -> None:
        """Of one observer's INT8, whose speed is that of all."""
        names = [
            name for name in self.results() if not name.startswith("int8-") or name[5:] in ("auto", "plain", "plain-mixed", "qat")
        ]
        models = {name: self.compiled(name) for name in names}
        ratios: dict[str, dict[str, float]] = {name: {} for name in names}
        for batch in (1, 32):
            x = torch.rand(batch, 3, self.side, self.side)
            taken = latency_of({name: partial(model, x) for name, model in models.items()}, 10**6, self.arguments.timing)
            for name, times in taken.items():
                ratios[name][str(batch)] = ratio_of(times, taken["fp32"])
        write_atomic(self.folder / "latency.json", json.dumps(ratios))

    def report(self) -> None:
        results, place = self.results(), self.folder / "latency.json"
        ratios = json.loads(place.read_text()) if place.exists() else {}
        baseline = results["fp32"]
        for name, result in results.items():
            line = f"{name:<20} {share(result['test_right']):.2%} of the test images"
            if name != "fp32":
                line += "".join(f"  {part} {change(result, baseline, part)}" for part in ("test", "held_out"))
                line += f"  file {result['bytes'] / baseline['bytes']:.2f}×" if name != "bf16" else ""
                line += "".join(f"  {ratio:.2f}× the time at batch {batch}" for batch, ratio in ratios.get(name, {}).items())
                line += f"  {len(result['kept'])} layers in floating point" if result["kept"] else ""
            print(line)


def share(right: str) -> float:
    return right.count("1") / len(right)


def change(result: dict[str, Any], baseline: dict[str, Any], part: str) -> str:
    """The change of accuracy in points on the same images, and Tango's 95 % interval."""
    now, before = result[f"{part}_right"], baseline[f"{part}_right"]
    won = sum(a > b for a, b in zip(now, before, strict=True))
    lost = sum(a < b for a, b in zip(now, before, strict=True))
    low, high = paired_difference(won, lost, len(now))
    return f"{100 * (won - lost) / len(now):+.2f} ({100 * low:+.2f} … {100 * high:+.2f})"


def correct(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """For each sample whether the model is right."""
    with torch.no_grad():
        return [hit for x, y in batches for hit in (model(x).argmax(1) == y).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["train", "qat", "evaluate", "latency", "report"]
    parser.add_argument("--folder", type=Path, default=Path("out/mobilenet"))
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages)
    parser.add_argument("--full", action="store_true", help="MobileNetV3-Large, all images, at 64²")
    parser.add_argument("--epochs", type=int, help="of training the baseline")
    parser.add_argument("--seconds", type=float, help="for training the baseline, in place of --epochs; compiling comes on top")
    parser.add_argument("--tuning", type=int, help="epochs of training for INT8")
    parser.add_argument("--variants", nargs="+", help="what to evaluate, e.g. fp32 int8-qat; by default everything")
    parser.add_argument("--timing", type=float, default=20, help="seconds of timing at each batch size")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(arguments)
    for stage in arguments.stages:
        getattr(bench, stage)()


if __name__ == "__main__":
    main()
