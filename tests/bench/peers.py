"""Ways to train one job, the workbench among them, each timed end to end by the wall clock.

A :class:`Job` says what is trained. Each function takes one and gives samples per second over all ranks; the first epoch, in
which things warm up and compile, doesn't count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from workbench import Run, TrainConfig, launch, train
from workbench.events import Steps

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LAYOUT = torch.channels_last


@dataclass(frozen=True)
class Job:
    """What is trained, alike for all.

    Attributes:
        unit: of what is counted.
        batch, steps: samples of a rank's step; steps of an epoch.
        model: a new one.
        optimizer: for a model.
        samples: a data set of one rank's epoch, as users of PyTorch hold it: (x, y) each.
        prepare: what a training step of PyTorch does with a batch's x on the device; none for the workbench.
        config: of the workbench's run, for a number of ranks.
        images: whether x is stored channels-last.
        transformers: sizes of transformers' own model, for its Trainer; None where it doesn't take part.
    """

    name: str
    unit: str
    batch: int
    steps: int
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    samples: Callable[[], Dataset[Any]]
    config: Callable[[int], TrainConfig]
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    images: bool = False
    transformers: dict[str, int] | None = field(default=None)

    def on_device(self, x: Tensor) -> Tensor:
        x = self.prepare(x.to(DEVICE, non_blocking=True))
        return x.to(memory_format=LAYOUT) if self.images else x

    def network(self) -> nn.Module:
        net = self.model().to(DEVICE)
        return net.to(memory_format=LAYOUT) if self.images else net  # type: ignore[call-overload, no-any-return]

    def loader(self, workers: int) -> DataLoader[Any]:
        persistent: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
        data = self.samples()
        return DataLoader(data, self.batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=CUDA, **persistent)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def step_alone(job: Job, mode: str) -> float:
    """One batch that never changes, no input path: the ceiling."""
    net = job.network()
    if mode != "off":
        net.compile(mode=mode)
    x, y = next(iter(job.loader(0)))
    step = _step(job, net, job.optimizer(net))
    x, y = job.on_device(x), y.to(DEVICE)
    for _ in range(15 if CUDA else 1):
        step(x, y)
    count = min(200, job.steps)
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step(x, y)
    synchronize()
    return job.batch * count / (time.perf_counter() - start)


def _step(job: Job, net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    loss = nn.CrossEntropyLoss()

    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(net(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(job: Job, ranks: int, epochs: int, workers: int) -> float:
    """The loop of PyTorch's tutorials with bf16 autocast; DistributedDataParallel on several ranks."""
    if ranks == 1:
        return _plain_rank(job, epochs, workers)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ran = subprocess.run(
        [*command, "-m", "tests.bench.training", "--as-rank", job.name, "--epochs", str(epochs), "--workers", str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return float(ran.stdout.split()[-1])


def as_rank(job: Job, epochs: int, workers: int) -> float:
    """One rank of :func:`plain`."""
    import torch.distributed as dist

    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if CUDA else "gloo")
    rate = _plain_rank(job, epochs, workers, dist.get_world_size())
    dist.destroy_process_group()
    return rate


def _plain_rank(job: Job, epochs: int, workers: int, ranks: int = 1) -> float:
    net, data, start = job.network(), job.loader(workers), 0.0
    if ranks > 1:
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    step = _step(job, net, job.optimizer(net))
    for epoch in range(epochs):
        if epoch == 1:
            synchronize()
            start = time.perf_counter()
        for x, y in data:
            step(job.on_device(x), y.to(DEVICE, non_blocking=True))
    synchronize()
    return job.batch * len(data) * (epochs - 1) * ranks / (time.perf_counter() - start)


def lightning(job: Job, epochs: int, workers: int) -> float:
    """Lightning's Trainer, bf16-mixed, no logger, no checkpoints."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = job.network(), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return self.loss(self.net(job.on_device(x)), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self)

    class Clock(L.Callback):
        start = end = 0.0

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            synchronize()
            self.start, self.end = self.start or time.perf_counter(), time.perf_counter()

    clock, data = Clock(), job.loader(workers)
    L.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    ).fit(Module(), data)
    return job.batch * len(data) * (epochs - 1) / (clock.end - clock.start)


class Named(Dataset[Any]):
    """Samples as the Trainer of transformers takes them."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.samples[index]
        return {"input_ids": x, "labels": y}


def hugging_face(job: Job, epochs: int, workers: int, compiled: bool = False) -> float:
    """transformers' Trainer and its own classifier."""
    # Where Hugging Face's datasets aren't installed, it would take this project's folder of that name for them.
    sys.path[:] = [place for place in sys.path if not (Path(place or ".") / "datasets" / "digits.yaml").exists()]
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        start = end = 0.0

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.start, self.end = self.start or time.perf_counter(), time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=job.batch,
            bf16=True,
            use_cpu=not CUDA,
            torch_compile=compiled,
            optim="adamw_torch_fused" if CUDA else "adamw_torch",
            dataloader_num_workers=workers,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=50,
        )
        net = BertForSequenceClassification(BertConfig(**(job.transformers or {})))
        Trainer(net, arguments, train_dataset=Named(job.samples()), callbacks=[clock]).train()
    return job.batch * job.steps * (epochs - 1) / (clock.end - clock.start)


def workbench(
    job: Job, ranks: int, epochs: int, changes: dict[str, Any], look: Callable[[Run], None] = lambda run: None
) -> float:
    """The workbench from config to run folder, the Inspector at its default; ``look`` is shown the run."""
    config = job.config(ranks).override(
        {"epochs": epochs, "precision": "bf16", "eval_every": 0, "checkpoint.every_epochs": 0, **changes}
        | ({} if CUDA else {"log_every": 1})
    )
    with tempfile.TemporaryDirectory() as root:
        run = launch(config, ranks, root=root).wait() if ranks > 1 else train(config, root=root).run
        look(run)
        return rate(run)


def rate(run: Run) -> float:
    """Samples per second of all ranks after the first epoch, by the wall clock between the journal's lines."""
    timed = [event for event in run.events if isinstance(event, Steps) and event.epoch > 1]
    return float(run.config.data.batch_size * (timed[-1].step - timed[0].step) / (timed[-1].time - timed[0].time))
