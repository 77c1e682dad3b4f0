"""Images per second on CIFAR-10, end to end: the workbench beside a plain PyTorch loop and Lightning, in one run.

    python -m tests.bench.cifar [--epochs 6] [--out FILE]

ResNet-18 with a 3×3 stem, batch 512, bf16, random crop and flip. Each peer trains the same number of epochs; the first is
warm-up, the rest are timed by the wall clock, input included, evaluation excluded. On a CPU the sizes shrink and the figures
only show that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from workbench import Run, TrainConfig, train
from workbench.data import DataConfig, load_splits
from workbench.events import Steps
from workbench.models import ModelConfig, build_model

CUDA = torch.cuda.is_available()
BATCH = 512 if CUDA else 128
WIDTH = 64 if CUDA else 8
LIMIT = None if CUDA else 1280
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Images(Dataset[Any]):
    """CIFAR-10 as users hold it: one image at a time through torchvision's transforms."""

    def __init__(self) -> None:
        from torchvision import transforms

        splits = load_splits(DataConfig(name="cifar10", limit=LIMIT))
        self.x, self.y = splits.train.x, splits.train.y  # type: ignore[union-attr]
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(splits.mean, splits.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.x[index]), self.y[index]


def loader(workers: int) -> DataLoader[Any]:
    return DataLoader(
        Images(),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=CUDA,
        prefetch_factor=4,
    )


def model() -> nn.Module:
    return build_model(ModelConfig(name="resnet18_cifar", num_classes=10, in_channels=3, args={"width": WIDTH}))


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=CUDA)


def step_alone(mode: str) -> float:
    """One batch that never changes, no input path: the ceiling."""
    net = model().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if mode != "off":
        net.compile(mode=mode)
    optimizer, loss = sgd(net), nn.CrossEntropyLoss()
    x = torch.randn(BATCH, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(net(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(20 if CUDA else 1):
        step()
    count = 300 if CUDA else 3
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return BATCH * count / (time.perf_counter() - start)


def plain_loop(epochs: int, workers: int) -> float:
    """The loop of PyTorch's tutorials, with bf16 autocast and channels-last."""
    data, net = loader(workers), model().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, loss = sgd(net), nn.CrossEntropyLoss()
    start = 0.0
    for epoch in range(epochs):
        if epoch == 1:
            synchronize()
            start = time.perf_counter()
        for x, y in data:
            x = x.to(DEVICE, memory_format=torch.channels_last, non_blocking=True)
            y = y.to(DEVICE, non_blocking=True)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                value = loss(net(x), y)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    synchronize()
    return BATCH * len(data) * (epochs - 1) / (time.perf_counter() - start)


def lightning(epochs: int, workers: int) -> float:
    """Lightning's Trainer, bf16-mixed, channels-last, no logger, no checkpoints."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            return self.loss(self.net(x.to(memory_format=torch.channels_last)), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    class Clock(L.Callback):
        start = end = 0.0

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            synchronize()
            if trainer.current_epoch == 0:
                self.start = time.perf_counter()
            self.end = time.perf_counter()

    clock, data = Clock(), loader(workers)
    torch.backends.cudnn.benchmark = True
    trainer = L.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(Module(), data)
    return BATCH * len(data) * (epochs - 1) / (clock.end - clock.start)


def workbench(epochs: int, compile_mode: str, inspector: bool = True) -> float:
    """The workbench from config to run folder; the Inspector at its default, or off."""
    config = TrainConfig(
        data={"name": "cifar10", "batch_size": BATCH, "limit": LIMIT},
        model={"name": "resnet18_cifar", "args": {"width": WIDTH}},
        optim={"name": "sgd", "lr": 0.1},
        epochs=epochs,
        precision="bf16",
        compile=compile_mode,
        eval_every=0,
        checkpoint={"every_epochs": 0},
    )
    if not inspector:
        config = config.override({f"probes.{kind}.every": 0 for kind in ("gradients", "activations", "memory", "communication")})
    with tempfile.TemporaryDirectory() as root:
        return rate(train(config, root=root).run)


def rate(run: Run) -> float:
    """Images per second after the first epoch, by the wall clock between the journal's lines."""
    steps = [event for event in run.events if isinstance(event, Steps)]
    timed = [event for event in steps if event.epoch > 1]
    return BATCH * (timed[-1].step - timed[0].step) / (timed[-1].time - timed[0].time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8 if CUDA else 3)
    parser.add_argument("--workers", type=int, default=min(15, (os.cpu_count() or 2) - 1))
    parser.add_argument("--only", default="", help="comma-separated names")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    epochs, workers = arguments.epochs, arguments.workers
    contestants: dict[str, Callable[[], float]] = {
        "step alone, captured": lambda: step_alone("reduce-overhead"),
        "workbench, captured": lambda: workbench(epochs * 2, "reduce-overhead"),
        "workbench, captured, Inspector off": lambda: workbench(epochs * 2, "reduce-overhead", inspector=False),
        f"Lightning, {workers} workers": lambda: lightning(epochs, workers),
        f"plain loop, {workers} workers": lambda: plain_loop(epochs, workers),
        "step alone, eager": lambda: step_alone("off"),
        "workbench, eager": lambda: workbench(epochs * 2, "off"),
        "step alone, compiled": lambda: step_alone("default"),
    }
    figures = {}
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, batch {BATCH}", flush=True)
    for name, measure in contestants.items():
        if arguments.only and name not in arguments.only.split(";"):
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            figures[name] = round(measure())
            print(f"{name:<42} {figures[name]:>9,} images/s", flush=True)
        except Exception as error:
            print(f"{name:<42} failed: {type(error).__name__}: {error}", flush=True)
            figures[name] = None
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
