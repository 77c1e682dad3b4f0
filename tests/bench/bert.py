"""Sequences per second of BERT-base, end to end: the workbench beside the Hugging Face Trainer and Lightning, in one run.

    python -m tests.bench.bert [--epochs 4] [--out FILE]
    python -m tests.bench.bert --ranks 1 2 --only "workbench, captured;workbench, eager;plain DDP"

Classification of 128 random token ids, 64 a rank and step, bf16, AdamW. Each peer trains the same number of epochs of 12,800
sequences a rank; the first is warm-up, the rest are timed by the wall clock, input included. ``--ranks 1 2`` runs those that can
on two GPUs as well, beside the fastest of all on one. On a CPU the sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import Run, TrainConfig, launch, train
from workbench.data.splits import Arrays, Splits
from workbench.events import Steps
from workbench.models import ModelConfig, build_model

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCH = 64 if CUDA else 4
LENGTH = 128 if CUDA else 16
STEPS = 200 if CUDA else 20
"""Of an epoch."""
SIZE = {} if CUDA else {"layers": 2, "width": 32, "heads": 2}
VOCABULARY = 30522


def texts(ranks: int = 1) -> Splits:
    """Random sequences and labels."""
    generator = torch.Generator().manual_seed(0)
    count = BATCH * STEPS * ranks

    def some(samples: int) -> Arrays:
        ids = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=generator)
        return Arrays(ids, torch.randint(2, (samples,), generator=generator))

    return Splits(some(count), some(BATCH), classes=("no", "yes"))


def model() -> nn.Module:
    return build_model(ModelConfig(name="bert_base", num_classes=2, args=SIZE))


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=2e-5, fused=CUDA)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def step_alone(mode: str) -> float:
    """One batch that never changes, no input path: the ceiling."""
    net = model().to(DEVICE)
    if mode != "off":
        net.compile(mode=mode)
    optimizer, loss = adamw(net), nn.CrossEntropyLoss()
    x, y = (part[:BATCH].to(DEVICE) for part in (texts().train.x, texts().train.y))  # type: ignore[union-attr]

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(net(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(10 if CUDA else 1):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return BATCH * STEPS / (time.perf_counter() - start)


class Tokens(torch.utils.data.Dataset[Any]):
    """The sequences as the Trainer takes them."""

    def __init__(self) -> None:
        self.of = texts().train

    def __len__(self) -> int:
        return len(self.of)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.of.x[index], "labels": self.of.y[index]}  # type: ignore[union-attr]


def hugging_face(epochs: int, compiled: bool) -> float:
    """transformers' Trainer and its own classifier."""
    # Where Hugging Face's datasets aren't installed, it would take this project's folder of that name for them.
    sys.path[:] = [place for place in sys.path if not (Path(place or ".") / "datasets" / "digits.yaml").exists()]
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        start = end = 0.0

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.start, self.end = self.start or time.perf_counter(), time.perf_counter()

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128} if SIZE else {}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            bf16=True,
            use_cpu=not CUDA,
            torch_compile=compiled,
            optim="adamw_torch_fused" if CUDA else "adamw_torch",
            dataloader_num_workers=4 if CUDA else 0,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=50,
        )
        Trainer(BertForSequenceClassification(BertConfig(**sizes)), arguments, train_dataset=Tokens(), callbacks=[clock]).train()
    return BATCH * STEPS * (epochs - 1) / (clock.end - clock.start)


def lightning(epochs: int) -> float:
    """Lightning's Trainer, bf16-mixed, no logger, no checkpoints."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = model(), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.loss(self.net(batch["input_ids"]), batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self)

    class Clock(L.Callback):
        start = end = 0.0

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            synchronize()
            self.start, self.end = self.start or time.perf_counter(), time.perf_counter()

    clock = Clock()
    data = torch.utils.data.DataLoader(
        Tokens(), BATCH, shuffle=True, drop_last=True, pin_memory=CUDA, num_workers=4, persistent_workers=True
    )
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
    return BATCH * STEPS * (epochs - 1) / (clock.end - clock.start)


def workbench(epochs: int, compile_mode: str, ranks: int, inspector: bool = True) -> float:
    """The workbench from config to run folder; the Inspector at its default, or off."""
    config = TrainConfig(
        data={"name": f"{__file__}:texts", "args": {"ranks": ranks}, "batch_size": BATCH * ranks},
        model={"name": "bert_base", "args": SIZE},
        optim={"name": "adamw", "lr": 2e-5},
        epochs=epochs,
        precision="bf16",
        compile=compile_mode,
        eval_every=0,
        checkpoint={"every_epochs": 0},
    )
    if not inspector:
        config = config.override({f"probes.{kind}.every": 0 for kind in ("gradients", "activations", "memory", "communication")})
    with tempfile.TemporaryDirectory() as root:
        return rate(launch(config, ranks, root=root).wait() if ranks > 1 else train(config, root=root).run, ranks)


def rate(run: Run, ranks: int) -> float:
    """Sequences per second after the first epoch, by the wall clock between the journal's lines."""
    timed = [event for event in run.events if isinstance(event, Steps) and event.epoch > 1]
    return BATCH * ranks * (timed[-1].step - timed[0].step) / (timed[-1].time - timed[0].time)


def plain_ddp(epochs: int, ranks: int) -> float:
    """The loop of PyTorch's tutorials on DistributedDataParallel, bf16 autocast, batches on the device."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ran = subprocess.run(
        [*command, __file__, "--epochs", str(epochs), "--as-rank"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return float(ran.stdout.split()[-1])


def as_rank(epochs: int) -> None:
    """One rank of :func:`plain_ddp`; the first prints the rate of all."""
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if CUDA else "gloo")
    net = nn.parallel.DistributedDataParallel(model().to(device), gradient_as_bucket_view=True)
    optimizer, loss = adamw(net), nn.CrossEntropyLoss()
    x, y = (part.to(device) for part in (texts().train.x, texts().train.y))  # type: ignore[union-attr]
    start = 0.0
    for epoch in range(epochs):
        if epoch == 1:
            synchronize()
            dist.barrier()
            start = time.perf_counter()
        for begin in range(0, len(x), BATCH):
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(net(x[begin : begin + BATCH]), y[begin : begin + BATCH])
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    synchronize()
    dist.barrier()
    if dist.get_rank() == 0:
        print(len(x) * dist.get_world_size() * (epochs - 1) / (time.perf_counter() - start))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4 if CUDA else 3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--only", default="", help="names, with semicolons between")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    epochs = arguments.epochs
    if arguments.as_rank:
        as_rank(epochs)
        return
    alone: dict[str, Callable[[], float]] = {
        "step alone, captured": lambda: step_alone("reduce-overhead"),
        "step alone, eager": lambda: step_alone("off"),
        "HF Trainer": lambda: hugging_face(epochs, False),
        "HF Trainer, compiled": lambda: hugging_face(epochs, True),
        "Lightning": lambda: lightning(epochs),
    }
    together: dict[str, Callable[[int], float]] = {
        "workbench, captured": lambda ranks: workbench(epochs, "reduce-overhead", ranks),
        "workbench, captured, Inspector off": lambda ranks: workbench(epochs, "reduce-overhead", ranks, inspector=False),
        "workbench, eager": lambda ranks: workbench(epochs, "off", ranks),
        "plain DDP": lambda ranks: plain_ddp(epochs, ranks),
    }
    figures: dict[str, dict[int, float]] = {}
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {BATCH} × {LENGTH} a rank", flush=True)
    for ranks in arguments.ranks:
        contestants = {name: partial(make, ranks) for name, make in together.items()}
        for name, measure in ({**contestants, **alone} if ranks == 1 else contestants).items():
            if arguments.only and name not in arguments.only.split(";"):
                continue
            torch.manual_seed(0)
            torch._dynamo.reset()
            try:
                figure = measure()
            except Exception as error:
                print(f"{ranks} × {name:<40} failed: {type(error).__name__}: {error}"[:600], flush=True)
                continue
            figures.setdefault(name, {})[ranks] = figure
            fastest = max((found[1] for found in figures.values() if 1 in found), default=None)
            beside = f"   {figure / fastest:.2f} × the fastest on one" if ranks > 1 and fastest else ""
            print(f"{ranks} × {name:<40} {figure:>9,.0f} sequences/s{beside}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
