"""Samples per second of training, end to end: the workbench beside plain PyTorch, the Hugging Face Trainer and Lightning.

    python -m tests.bench.training [--jobs bert resnet50 resnet18] [--epochs 4] [--out FILE]
    python -m tests.bench.training --jobs bert resnet50 --ranks 1 2 --only "workbench, captured;workbench, eager;plain"

* ``bert``     — BERT-base, 64 × 128 random token ids a rank, AdamW.
* ``resnet50`` — 128 random images of 224² a rank, SGD.
* ``resnet18`` — CIFAR-10, batch 512, 3×3 stem, random crop and flip, SGD.

All in bf16. The first epoch is warm-up, the rest are timed by the wall clock, input included. ``step alone`` has no input path:
one batch that never changes, the ceiling. ``--ranks 1 2`` runs those that can on two GPUs as well, beside the fastest of all on
one. On a CPU the sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tests.bench import peers
from tests.bench.peers import CUDA, DEVICE, Job
from workbench import TrainConfig
from workbench.data import DataConfig, load_splits
from workbench.data.splits import Arrays, Splits
from workbench.models import ModelConfig, build_model

CHANNELS = (0.45, 0.25)
"""Mean and standard deviation of the random images' channels, of 1."""


def built(name: str, classes: int, **args: Any) -> Callable[[], nn.Module]:
    return lambda: build_model(ModelConfig(name=name, num_classes=classes, args=args))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=CUDA)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=2e-5, fused=CUDA)


def normalized(x: Tensor) -> Tensor:
    return (x.float() / 255 - CHANNELS[0]) / CHANNELS[1]


# -- what is trained -----------------------------------------------------------------------------------------------------


@cache
def texts(count: int, length: int, vocabulary: int = 30522) -> Splits:
    """Random sequences and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (count, length), generator=generator)
    y = torch.randint(2, (count,), generator=generator)
    return Splits(Arrays(ids, y), Arrays(ids[:64], y[:64]), classes=("no", "yes"))


@cache
def pictures(count: int, side: int) -> Splits:
    """Random images and labels of 1,000 classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    y = torch.randint(1000, (count,), generator=generator)
    mean, std = (tuple(value for _ in range(3)) for value in CHANNELS)
    names = tuple(map(str, range(1000)))
    return Splits(Arrays(x, y), Arrays(x[:64], y[:64]), classes=names, mean=mean, std=std)


def as_tensors(splits: Splits) -> Dataset[Any]:
    return TensorDataset(splits.train.x, splits.train.y)  # type: ignore[union-attr]


def bert() -> Job:
    batch, steps, length = (64, 200, 128) if CUDA else (4, 10, 16)
    sizes = {} if CUDA else {"layers": 2, "width": 32, "heads": 2}
    theirs = {} if CUDA else {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}

    def config(ranks: int) -> TrainConfig:
        data = {
            "name": f"{__file__}:texts",
            "args": {"count": batch * steps * ranks, "length": length},
            "batch_size": batch * ranks,
        }
        return TrainConfig(data=data, model={"name": "bert_base", "args": sizes}, optim={"name": "adamw", "lr": 2e-5})

    samples = partial(texts, batch * steps, length)
    return Job(
        "bert", "sequences", batch, steps, built("bert_base", 2, **sizes), adamw, lambda: as_tensors(samples()), config,
        transformers=theirs,
    )  # fmt: skip


def resnet50() -> Job:
    batch, steps, side = (128, 60, 224) if CUDA else (4, 5, 32)

    def config(ranks: int) -> TrainConfig:
        data = {
            "name": f"{__file__}:pictures",
            "args": {"count": batch * steps * ranks, "side": side},
            "batch_size": batch * ranks,
        }
        return TrainConfig(data=data, model={"name": "resnet50"}, optim={"name": "sgd", "lr": 0.1})

    samples = partial(pictures, batch * steps, side)
    return Job(
        "resnet50", "images", batch, steps, built("resnet50", 1000), sgd, lambda: as_tensors(samples()), config,
        prepare=normalized, images=True,
    )  # fmt: skip


class Augmented(Dataset[Any]):
    """CIFAR-10 as users hold it: one image at a time through torchvision's transforms."""

    def __init__(self, limit: int | None) -> None:
        from torchvision import transforms

        splits = load_splits(DataConfig(name="cifar10", limit=limit))
        self.x, self.y = splits.train.x, splits.train.y  # type: ignore[union-attr]
        steps = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(splits.mean, splits.std)])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.x[index]), self.y[index]


def resnet18() -> Job:
    batch, width, limit = (512, 64, None) if CUDA else (128, 8, 1280)

    def config(ranks: int) -> TrainConfig:
        data = {"name": "cifar10", "batch_size": batch * ranks, "limit": limit, "augment": ("crop", "flip")}
        return TrainConfig(
            data=data, model={"name": "resnet18_cifar", "args": {"width": width}}, optim={"name": "sgd", "lr": 0.1}
        )

    steps = (limit or 50_000) // batch
    model = built("resnet18_cifar", 10, width=width)
    return Job("resnet18", "images", batch, steps, model, sgd, partial(Augmented, limit), config, images=True)


JOBS: dict[str, Callable[[], Job]] = {"bert": bert, "resnet50": resnet50, "resnet18": resnet18}


# -- who trains it -------------------------------------------------------------------------------------------------------


def contestants(job: Job, ranks: int, epochs: int, workers: int) -> dict[str, Callable[[], float]]:
    off = {f"probes.{kind}.every": 0 for kind in ("gradients", "activations", "memory", "communication")}
    found: dict[str, Callable[[], float]] = {
        "workbench, captured": lambda: peers.workbench(job, ranks, epochs, {"compile": "reduce-overhead"}),
        "workbench, captured, Inspector off": lambda: peers.workbench(job, ranks, epochs, {"compile": "reduce-overhead", **off}),
        "workbench, eager": lambda: peers.workbench(job, ranks, epochs, {}),
        "plain": lambda: peers.plain(job, ranks, epochs, workers),
    }
    if ranks > 1:
        rounded = {"compile": "reduce-overhead", "communication.compress": "bf16"}
        return found | {"workbench, captured, bf16 exchange": lambda: peers.workbench(job, ranks, epochs, rounded)}
    found |= {
        "step alone, captured": lambda: peers.step_alone(job, "reduce-overhead"),
        "step alone, eager": lambda: peers.step_alone(job, "off"),
        "Lightning": lambda: peers.lightning(job, epochs, workers),
    }
    if job.transformers is not None:
        found |= {
            "HF Trainer": lambda: peers.hugging_face(job, epochs, workers),
            "HF Trainer, compiled": lambda: peers.hugging_face(job, epochs, workers, compiled=True),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--epochs", type=int, default=4 if CUDA else 3)
    parser.add_argument("--workers", type=int, default=min(15, (os.cpu_count() or 2) - 1), help="of the peers' loaders")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--only", default="", help="names, with semicolons between")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", choices=JOBS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        rate = peers.as_rank(JOBS[arguments.as_rank](), arguments.epochs, arguments.workers)
        if os.environ["RANK"] == "0":
            print(rate)
        return
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    torch.backends.cudnn.benchmark = True
    figures: dict[str, dict[str, float]] = {}
    for job in (JOBS[name]() for name in arguments.jobs):
        alone: list[float] = []
        for ranks in arguments.ranks:
            for name, measure in contestants(job, ranks, arguments.epochs, arguments.workers).items():
                if arguments.only and name not in arguments.only.split(";"):
                    continue
                torch.manual_seed(0)
                torch._dynamo.reset()
                try:
                    figure = measure()
                except Exception as error:
                    print(f"{job.name} {ranks} × {name:<36} failed: {type(error).__name__}: {error}"[:600], flush=True)
                    continue
                figures.setdefault(f"{job.name} {ranks}", {})[name] = figure
                alone += [figure] if ranks == 1 else []
                beside = f"   {figure / max(alone):.2f} × the fastest on one" if ranks > 1 and alone else ""
                print(f"{job.name} {ranks} × {name:<36} {figure:>9,.0f} {job.unit}/s{beside}", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(figures, indent=1))
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
