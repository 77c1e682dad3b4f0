"""Every fault planted on real data: after how many steps it is found, and whether its own advice cures it; healthy runs beside.

    python -m tests.bench.faults                  # faults, and ten healthy runs
    python -m tests.bench.faults --only dead leak
    python -m tests.bench.faults --healthy 10     # ten other healthy runs: seeds from 10

A fault is a healthy config with settings that spoil it. The diagnosis looks at the readings as they came, at 25 points of the
run. Then the finding's advice is applied to the spoilt config as a new run, the first remedy first: cured means that the run ends
without the finding, and where the fault costs accuracy, that held-out accuracy is back within 0.05 of the healthy run's.

In healthy runs nothing may be found at any of the 25 points, notes included. CIFAR-10 and AG News are read below
``WORKBENCH_DATA``; what isn't there is left out, and said.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before anything imports torch: small models on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from workbench import Run, TrainConfig, WorkbenchError, launch, train
from workbench.data.config import DataConfig
from workbench.data.splits import Arrays, Splits, load_splits
from workbench.diagnosis import KINDS, config_now, diagnose, findings_of
from workbench.events import Finding

HERE = Path(__file__).resolve()
LOOKS = 25
"""Points of a run at which the diagnosis looks."""
NEAR = 0.05
"""Of held-out accuracy, that a cured run may lack of the healthy one's."""

# -- models and data that carry a fault ------------------------------------------------------------------------------------


def deep(
    num_classes: int = 10,
    in_channels: int = 1,
    size: int = 8,
    depth: int = 6,
    width: int = 48,
    act: str = "Tanh",
    gain: float = 1.0,
) -> nn.Sequential:
    """[B, in_channels, size, size] -> logits, through ``depth`` layers whose first weights are ``gain`` times PyTorch's."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = in_channels * size * size
    for _ in range(depth):
        layers += [nn.Linear(features, width), getattr(nn, act)()]
        features = width
    model = nn.Sequential(*layers, nn.Linear(features, num_classes))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= gain
    return model


class Leaky(nn.Module):
    """Keeps what it puts out, as a list of losses with their graphs would."""

    def __init__(self, body: nn.Module, kept: int) -> None:
        super().__init__()
        self.body, self.size, self.kept = body, kept, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.training:
            self.kept.append(y.detach().new_ones(self.size))
        return y


def leaky(num_classes: int = 10, in_channels: int = 1, kept: int = 1 << 19) -> nn.Module:
    """A perceptron that keeps ``kept`` numbers of each step."""
    return Leaky(deep(num_classes, in_channels, depth=2, act="ReLU"), kept)


class Times(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def loud(num_classes: int = 10, in_channels: int = 1, factor: float = 1.0) -> nn.Sequential:
    """A perceptron whose values are ``factor`` times as large in between."""
    layers = [nn.Flatten(), nn.Linear(64 * in_channels, 64), nn.ReLU(), Times(factor), Times(1 / factor)]
    return nn.Sequential(*layers, nn.Linear(64, num_classes))


class Faint(nn.Module):
    """Cross-entropy ``factor`` times as large, as a mean over too many."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.factor * nn.functional.cross_entropy(output.float(), target)


class Slow(Dataset[Any]):
    """Samples, each behind a pause, as from a slow disk."""

    def __init__(self, samples: Arrays, pause: float) -> None:
        self.x, self.y, self.pause = samples.x.float() / 16, samples.y, pause

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        return self.x[index], self.y[index]


def slow_digits(pause: float) -> Splits:
    """The digits as a torch dataset, each sample behind ``pause`` seconds."""
    splits = load_splits(DataConfig())
    assert isinstance(splits.train, Arrays) and isinstance(splits.eval, Arrays)
    return Splits(Slow(splits.train, pause), Slow(splits.eval, 0.0), classes=splits.classes)


# -- faults ----------------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> TrainConfig:
    """Digits and a perceptron that learns them, but for ``changes``: dotted names, ``__`` for the dot."""
    base = TrainConfig(
        data={"name": "digits", "batch_size": 64},
        model={"name": f"{HERE}:deep", "args": {"depth": 3, "act": "ReLU"}},
        optim={"name": "adamw", "lr": 3e-3},
        epochs=10,
        device="cpu",
        precision="fp32",
        checkpoint={"every_epochs": 0},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


@dataclass(frozen=True)
class Fault:
    """What is planted, and what must be found of it.

    Attributes:
        finding: the rule's name.
        spoilt: overrides that spoil the healthy config.
        within: optimizer steps within which it must be found.
        healthy: changes to :func:`config`.
        nproc: processes.
        needs: the kind of reading and the column that the rule reads.
        fresh: in a process of its own, so that memory given back by earlier runs does not hide what this one takes.
        costs: whether the fault costs accuracy, so that its cure must bring it back.
    """

    finding: str
    spoilt: Mapping[str, Any]
    within: int
    healthy: Mapping[str, Any] = field(default_factory=dict)
    nproc: int = 1
    needs: tuple[str, str] | None = None
    fresh: bool = False
    costs: bool = True

    @property
    def base(self) -> TrainConfig:
        return config(**self.healthy)


FINE = {"probes__gradients__every": 1, "probes__activations__every": 1}
CIFAR = {"data__name": "cifar10", "data__batch_size": 64}
FAULTS: dict[str, Fault] = {
    "NaN": Fault("non_finite_loss", {"optim.name": "sgd", "optim.lr": 50.0}, 40, {"log_every": 5}),
    "NaN gradients": Fault("non_finite_gradients", {"optim.name": "sgd", "optim.lr": 50.0}, 40, {"log_every": 20, **FINE}),
    "NaN outputs": Fault("non_finite_activations", {"optim.name": "sgd", "optim.lr": 50.0}, 40, {"log_every": 20, **FINE}),
    "diverging": Fault(
        "diverging_loss", {"optim.lr": 3.0}, 60, {"optim__name": "sgd", "optim__lr": 0.05, "model__args__act": "Tanh"}
    ),
    "plateau": Fault("plateau", {"optim.lr": 1e-6}, 160),
    "noise": Fault("noisy_loss", {"data.batch_size": 1, "max_steps": 300}, 150, {"optim__name": "sgd", "optim__lr": 0.05}),
    "over-fitting": Fault(
        "overfitting",
        {"epochs": 40},
        300,
        {
            **CIFAR,
            "data__limit": 500,
            "data__augment": (),
            "model__args": {"size": 32, "depth": 2, "width": 128, "act": "ReLU"},
            "epochs": 8,
            "eval_every": 4,
        },
    ),
    "exploding": Fault(
        "exploding_gradients",
        {"model.args.gain": 6.0},
        20,
        {"optim__name": "sgd", "optim__lr": 0.1, "model__args__depth": 4, **FINE},
    ),
    "vanishing": Fault(
        "vanishing_gradients",
        {"optim.name": "sgd", "optim.lr": 0.05},
        40,
        {"model__args": {"depth": 5, "act": "Sigmoid"}, "optim__lr": 0.01, "epochs": 40},
    ),
    "fp16 underflow": Fault(
        "gradient_underflow",
        {"precision": "fp16"},
        30,
        {"loss__name": f"{HERE}:Faint", "loss__args": {"factor": 1e-10}, "optim__args": {"eps": 1e-16}},
        needs=("gradients", "histogram"),
    ),
    "fp16 overflow": Fault(
        "overflowing_activations", {"precision": "fp16"}, 30, {"model__name": f"{HERE}:loud", "model__args": {"factor": 1e4}}
    ),
    "rate too high": Fault("rate_too_high", {"optim.lr": 1.0}, 60, needs=("gradients", "update_ratio")),
    "rate too low": Fault("rate_too_low", {"optim.lr": 1e-6}, 80, needs=("gradients", "update_ratio")),
    "dead units": Fault("dead_activations", {"optim.lr": 0.3}, 60),
    "saturated units": Fault("saturated_activations", {"optim.lr": 0.3}, 60, {"model__args__act": "Tanh"}),
    "leak": Fault(
        "memory_leak",
        {"model.args.kept": 1 << 19},
        120,
        {"model__name": f"{HERE}:leaky", "model__args": {"kept": 1}},
        fresh=True,
        costs=False,
    ),
    "slow input": Fault(
        "starved_step",
        {"data.workers": 0},
        40,
        {"data__name": f"{HERE}:slow_digits", "data__args": {"pause": 5e-4}, "epochs": 2},
        costs=False,
    ),
    "slow rank": Fault(
        "slow_rank",
        {"model.args.times": 3},
        40,
        {
            "model__name": f"{HERE.parents[1] / 'training' / 'net.py'}:slowed_net",
            "model__args": {"times": 1, "width": 32},
            "epochs": 4,
        },
        nproc=2,
        costs=False,
    ),
    "slow wire": Fault(
        "exposed_communication", {"model.args.width": 2048}, 40, {"model__args__width": 48, "epochs": 4}, nproc=2, costs=False
    ),
}


def healthy(seed: int) -> dict[str, TrainConfig]:
    """Ten configs that learn: models, optimizers, precisions."""
    small = {"widths": [16, 32]}
    text: dict[str, Any] = {"data__name": "ag_news", "data__args": {"length": 24, "vocabulary": 4096}, "optim__name": "adamw"}
    lstm = {"model__name": "lstm", "model__args": {"width": 32, "embedding": 32, "vocab_size": 4096}}
    bert = {"model__name": "bert_small", "model__args": {"layers": 2, "width": 32, "heads": 2, "vocab_size": 4096, "length": 24}}
    made: dict[str, dict[str, Any]] = {
        "mlp, sgd": {"model__name": "mlp", "model__args": {}, "optim__name": "sgd", "optim__lr": 0.05, "epochs": 20},
        "mlp, adamw, bf16": {"model__name": "mlp", "model__args": {}, "precision": "bf16", "epochs": 20},
        "tanh, adamw": {"model__args": {"depth": 3, "act": "Tanh"}, "epochs": 20},
        "convnet, sgd": {"model__name": "convnet", "model__args": small, "optim__name": "sgd", "optim__lr": 0.05, "epochs": 15},
        "convnet, adamw, bf16": {"model__name": "convnet", "model__args": small, "precision": "bf16", "epochs": 4},
        "convnet, CIFAR-10": {**CIFAR, "data__limit": 3000, "model__name": "convnet", "model__args": small, "epochs": 5},
        "resnet20, sgd": {"model__name": "resnet20", "model__args": {}, "optim__name": "sgd", "optim__lr": 0.1, "epochs": 3},
        "resnet20, adamw, clipped": {"model__name": "resnet20", "model__args": {}, "clip__mode": "dynamic", "epochs": 2},
        "lstm, AG News": {**text, **lstm, "optim__lr": 5e-3, "epochs": 2},
        "bert, AG News": {**text, **bert, "optim__lr": 2e-3, "epochs": 2},
    }
    return {name: config(**changes, seed=seed + number) for number, (name, changes) in enumerate(made.items())}


# -- runs ------------------------------------------------------------------------------------------------------------------


def carried_out(settings: TrainConfig, folder: Path, nproc: int = 1, fresh: bool = False) -> Run:
    """The run of a config, finished or failed; in this process, unless it needs more or a fresh one."""
    if nproc > 1 or fresh:
        return launch(settings, nproc, root=folder).wait(check=False)
    before = set(folder.glob("*"))
    try:
        return train(settings, root=folder).run
    except WorkbenchError:
        (path,) = set(folder.glob("*")) - before
        return Run.open(path)


def looks(run: Run) -> dict[str, tuple[int, Finding]]:
    """By name, what was found at any point of the run: the step at which it first was, and the finding as it was then."""
    history, settings = run.history, config_now(run)
    tables = {kind: run.readings(kind) for kind in KINDS}
    seen: dict[str, tuple[int, Finding]] = {}
    steps = history["step"].tolist()
    for at in [*steps[:: max(1, len(steps) // LOOKS)], *steps[-1:]]:
        part: dict[str, Any] = {kind: table[table["step"] <= at] for kind, table in tables.items()}
        for finding in diagnose(history[history["step"] <= at], **part, config=settings):
            seen.setdefault(finding.name, (at, finding))
    return seen


def accuracy(run: Run) -> float:
    return float(run.metrics.get("accuracy", float("nan")))


@functools.cache
def reference(base: str, folder: Path) -> float:
    """Accuracy of a healthy run, by the YAML of its config."""
    path = folder / "base.yaml"
    path.write_text(base)
    return accuracy(carried_out(TrainConfig.from_yaml(path), folder))


def try_fault(fault: Fault, folder: Path) -> list[str]:
    """Cells of the table: found at step, also found, the remedy, cured, accuracies spoilt, cured and healthy."""
    spoilt = fault.base.override(fault.spoilt)
    run = carried_out(spoilt, folder, fault.nproc, fault.fresh)
    if run.history.empty:
        return [run.error or "no step", *[""] * 6]
    if fault.needs is not None and fault.needs[1] not in run.readings(fault.needs[0]):
        return [f"needs the column {fault.needs[1]}", *[""] * 6]
    seen = looks(run)
    others = ", ".join(sorted(set(seen) - {fault.finding}))
    if fault.finding not in seen:
        return [f"NOT FOUND in {run.progress.step}", others, *[""] * 5]
    at, finding = seen[fault.finding]
    told = f"{at}" if at <= fault.within else f"{at}, LATE"
    healthy_accuracy = reference(fault.base.to_yaml(), folder) if fault.costs else float("nan")
    tried, after = "no setting would", float("nan")
    cured = "no"
    for number, remedy in enumerate(finding.remedies, 1):
        again = carried_out(spoilt.override(remedy), folder, fault.nproc, fault.fresh)
        after = accuracy(again)
        tried = f"{number}: " + " ".join(f"{name}={value}" for name, value in remedy.items())
        gone = again.status == "finished" and fault.finding not in {f.name for f in findings_of(again)}
        if gone and (not fault.costs or after >= healthy_accuracy - NEAR):
            cured = "yes"
            break
    figures = [f"{value:.3f}" if value == value else "" for value in (accuracy(run), after, healthy_accuracy)]
    return [told, others, tried, cured, *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of the names of faults")
    parser.add_argument("--healthy", type=int, help="only healthy runs, with seeds from this on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.healthy is None:
            print(
                f"{'fault':<18}finding at step (within) | also found | remedy | cured | accuracy: spoilt, cured, healthy",
                flush=True,
            )
            for label, fault in FAULTS.items():
                if arguments.only and not any(part in label or part == fault.finding for part in arguments.only):
                    continue
                since = time.monotonic()
                told, *cells = try_fault(fault, folder)
                row = [f"{label:<18}{fault.finding} {told} ({fault.within})", *cells, f"{time.monotonic() - since:.0f} s"]
                print(" | ".join(row), flush=True)
        if not arguments.only:
            alarms = 0
            for label, settings in healthy(arguments.healthy or 0).items():
                since = time.monotonic()
                run = carried_out(settings, folder)
                seen = {name: at for name, (at, _) in looks(run).items()}
                alarms += len(seen)
                steps, seconds = run.progress.step, time.monotonic() - since
                told = f"accuracy {accuracy(run):.3f}, {steps} steps, found: {seen or 'nothing'}, {seconds:.0f} s"
                print(f"healthy: {label:<28} {run.error or told}", flush=True)
            print(f"false alarms, notes included: {alarms}")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
