"""What pruning costs on CIFAR-10: ResNet-18 cut by 30 %, 50 % and further, three seeds, beside torch-pruning's own flow.

    python -m tests.bench.pruning --folder out/pruning            # everything, then the report; days on a CPU, an hour on a GPU
    CUDA_VISIBLE_DEVICES=1 python -m tests.bench.pruning &        # start more of them, on any GPU: they share the work
    python -m tests.bench.pruning --report

What is made, each in a folder of its own that says when it is done, so that all may stop at any time and go on later:

* ``baseline`` — a ResNet-18 for each of three seeds: the model to prune; ``teacher`` is the mean of the three.
* ``trial``    — one baseline cut by 80 % in several ways and tuned shortly; the way that does best on the held-out training
  images is taken for all that follows.
* ``pruned``   — the baseline pruned and tuned, learning from the teacher; each ratio on the baseline itself.
* ``alone``    — the same without the teacher: what learning from it gains.
* ``peer``     — the baseline pruned as torch-pruning's CIFAR benchmark does it (group norms, globally, 400 small steps), and
  tuned as there (SGD 0.01, batch 128, decay at 60 % and 80 %), for as many epochs.

The report has the test accuracy of each, the change against its baseline on the same images with its interval, and the same
on 2,000 training images held out from all training, to choose by; the 5,000 test images only report.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import TrainConfig, load_model, save_model, train
from workbench.compress import GradualConfig, prune_gradually
from workbench.compress.cost import count_macs
from workbench.data import DataConfig, load_batches
from workbench.models.ensemble import ensemble_of
from workbench.models.structure import count_parameters
from workbench.storage import write_atomic

CUDA = torch.cuda.is_available()
START = time.monotonic()
HELD_OUT = 2000
SEEDS = (0, 1, 2)
# Channels by eights, as tensor cores take 16-bit numbers.
WAYS = {
    "l1": GradualConfig(steps=1, round_to=8),
    "l1-economy": GradualConfig(steps=1, round_to=8, economy=0.5),
    "l1-economy-1": GradualConfig(steps=1, round_to=8, economy=1.0),
    "lamp-economy": GradualConfig(steps=1, round_to=8, economy=0.5, criterion="lamp"),
    "l1-economy-twice": GradualConfig(steps=2, round_to=8, economy=0.5, schedule="geometric"),
}
SAMPLE = torch.zeros(1, 3, 32, 32)


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
        loss={"args": {"label_smoothing": 0.1}},
        schedule={"warmup": 0.1},
        ema=0.999,
        precision="bf16",
        compile="reduce-overhead" if CUDA else "off",
        eval_every=0,
        checkpoint={"every_epochs": 0},
        epochs=epochs,
        seed=seed,
    )
    return config.override({name.replace("__", "."): value for name, value in changes.items()})


@dataclass(frozen=True)
class Task:
    """Something to be made in the folder ``name``, once what it needs is there."""

    name: str
    make: Callable[[], None]
    needs: Sequence[str] = ()


class Bench:
    """The folder of all models and results; each has a folder there, with a model and, once it is done, ``result.json``."""

    def __init__(self, folder: Path, full: bool) -> None:
        self.folder = folder
        self.epochs, self.tuning = (160, 40) if full else (1, 2)
        self.small = {} if full else {"data.limit": 4000, "data.holdout": 500, "model.args": {"width": 8}, "precision": "fp32"}

    @cached_property
    def parts(self) -> dict[str, Any]:
        common = {"name": "cifar10", "eval_batch_size": 500, **({"limit": 4000} if self.small else {})}
        held_out = self.small.get("data.holdout", HELD_OUT)
        return {"test": load_batches(DataConfig(**common)), "held_out": load_batches(DataConfig(**common, holdout=held_out))}

    def work(self) -> None:
        """Make whatever is missing and not being made by another process, until everything is there."""
        if CUDA:
            torch.set_num_threads(4)  # several processes' searches would else fight for the same cores
        while missing := [task for task in self.tasks() if not self.has(task.name)]:
            for task in missing:
                if all(map(self.has, task.needs)):
                    with claimed(self.folder / task.name) as mine:
                        if mine and not self.has(task.name):
                            task.make()
                            break  # from the top: something that matters more may have become possible
            else:
                time.sleep(1)

    def has(self, name: str) -> bool:
        return (self.folder / name / "result.json").exists()

    def result(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "result.json").read_text())
        return found

    def model(self, name: str) -> nn.Module:
        return load_model(self.folder / name)

    def trained(self, config: TrainConfig, model: nn.Module | None = None) -> nn.Module:
        with tempfile.TemporaryDirectory() as root:
            return train(config.override(self.small), model=model, root=root).model

    def keep(self, name: str, model: nn.Module, **facts: Any) -> None:
        place = self.folder / name
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
        passed = f"[{time.monotonic() - START:.0f} s]"
        print(f"{passed:<9} {name:<20} {result['parameters']:>10,} parameters  {shares}  {facts}", flush=True)

    # -- what is made ----------------------------------------------------------------------------------------------

    def tasks(self) -> list[Task]:
        """Everything to be made, what matters most first."""
        baselines = [Task(f"seed-{seed}/baseline", partial(self.baseline, seed)) for seed in SEEDS]
        teacher = Task("teacher", self.teacher, [task.name for task in baselines])
        trials = [Task(f"trial/{name}", partial(self.trial, name), [baselines[0].name]) for name in WAYS]
        found = [*baselines, teacher, *trials]
        chosen = [teacher.name, *(task.name for task in trials)]
        wanted = [
            ("pruned", 0.5),
            ("pruned", 0.8),
            ("peer", 0.5),
            ("peer", 0.8),
            ("pruned", 0.65),
            ("pruned", 0.3),
            ("alone", 0.8),
        ]
        for kind, ratio in [*wanted, ("peer", 0.3)]:
            for seed in SEEDS:
                make = partial(getattr(self, kind), seed, ratio)
                needs = [f"seed-{seed}/baseline"] if kind == "peer" else chosen
                found.append(Task(f"seed-{seed}/{kind}-{ratio:g}", make, needs))
        return found

    def baseline(self, seed: int) -> None:
        self.keep(f"seed-{seed}/baseline", self.trained(recipe(seed, self.epochs)))

    def teacher(self) -> None:
        self.keep("teacher", ensemble_of([self.model(f"seed-{seed}/baseline") for seed in SEEDS]))

    def trial(self, way: str) -> None:
        self._pruned(f"trial/{way}", 0, 0.8, way, max(1, self.tuning // 4))

    def pruned(self, seed: int, ratio: float) -> None:
        learning = {"teacher": str(self.folder / "teacher"), "terms": {"soft": 0.9}, "task": 0.1, "temperature": 3.0}
        self._pruned(f"seed-{seed}/pruned-{ratio:g}", seed, ratio, self.way(), self.tuning, distill=learning)

    def alone(self, seed: int, ratio: float) -> None:
        self._pruned(f"seed-{seed}/alone-{ratio:g}", seed, ratio, self.way(), self.tuning)

    def way(self) -> str:
        """That of the trials which is right most often on the held-out images."""
        return max(WAYS, key=lambda way: share(self.result(f"trial/{way}")["held_out_right"]))

    def _pruned(self, name: str, seed: int, ratio: float, way: str, epochs: int, **changes: Any) -> None:
        wanted = WAYS[way].override({"ratio": ratio})
        tune = recipe(seed, max(1, epochs // wanted.steps), optim__lr=0.2, ema=0.998, **changes).override(self.small)
        result = prune_gradually(self.model(f"seed-{seed}/baseline"), wanted, tune, SAMPLE, folder=self.folder / name / "work")
        facts = {"ratio": ratio, "way": way, "epochs": tune.epochs * wanted.steps}
        self.keep(name, result.model, macs=count_macs(result.model.cpu().eval(), SAMPLE), **facts)

    def peer(self, seed: int, ratio: float) -> None:
        config = recipe(
            seed,
            self.tuning,
            data__batch_size=128,
            data__augment=("crop", "flip"),
            optim={"name": "sgd", "lr": 0.01, "weight_decay": 5e-4, "decay_vectors": True, "args": {"nesterov": False}},
            schedule={"name": "step", "warmup": 0.0, "milestones": (0.6, 0.8)},
            loss__args={},
            ema=0.0,
        )
        tuned = self.trained(config, pruned_by_peer(self.model(f"seed-{seed}/baseline"), ratio))
        self.keep(f"seed-{seed}/peer-{ratio:g}", tuned, ratio=ratio, epochs=self.tuning)

    def report(self) -> None:
        results = {
            str(place.parent.relative_to(self.folder)): json.loads(place.read_text())
            for place in [*self.folder.glob("teacher/result.json"), *self.folder.glob("*/*/result.json")]
        }
        kinds: dict[str, list[str]] = {}
        for name in sorted(results):
            kinds.setdefault(name.rpartition("/")[2], []).append(name)
        for kind, names in kinds.items():
            shares = [share(results[name]["test_right"]) for name in names]
            line = f"{kind:<11} {statistics.mean(shares):.2%} of the test images (seeds {', '.join(f'{s:.2%}' for s in shares)})"
            origins = [results.get(f"{name.partition('/')[0].replace('trial', 'seed-0')}/baseline") for name in names]
            if all(origins) and kind != "baseline":
                pairs = [(results[name], origin) for name, origin in zip(names, origins, strict=True) if origin]
                removed = statistics.mean(1 - a["parameters"] / b["parameters"] for a, b in pairs)
                line += f"  −{removed:.1%} parameters"
                for part in ("test", "held_out"):
                    mean, half = change([(a[f"{part}_right"], b[f"{part}_right"]) for a, b in pairs])
                    line += f"  {part} {100 * mean:+.2f} ± {100 * half:.2f}"
            print(line)


@contextmanager
def claimed(place: Path) -> Iterator[bool]:
    """Whether this process may make what belongs there; a claim ends with its process, however that ends."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / "claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


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

    before = count_parameters(model)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        SAMPLE,
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
    parser.add_argument("--full", action="store_true", help="without a GPU too: all the data, the whole width, every epoch")
    parser.add_argument("--report", action="store_true", help="only say what is there")
    arguments = parser.parse_args()
    bench = Bench(arguments.folder, CUDA or arguments.full)
    if not arguments.report:
        bench.work()
    bench.report()


if __name__ == "__main__":
    main()
