"""Every mesh beside one process: how far apart the losses are, and whether a checkpoint opens on all the others.

    python -m tests.bench.meshes [--model bert | vit] [--meshes "tensor=2" "pipeline=2 shard=2"] [--checkpoints]

A small BERT on made-up sentences, or a small vision transformer on digits, 24 steps of 4 micro-steps; on GPUs where there are
enough of them, else over gloo. ``--checkpoints`` stops a run on each mesh of two ranks half way and goes on, on every other and
on one.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from workbench import Run, TrainConfig, launch, train

NET = Path(__file__).resolve().parents[1] / "training" / "net.py"
MODELS = {
    "vit": {"data": {"name": "digits", "limit": 256}, "model": {"name": f"{NET}:vit"}},
    "bert": {
        "data": {"name": f"{NET}:words"},
        "model": {"name": "bert_small", "args": {"width": 32, "vocab_size": 100, "dropout": 0.0}},
    },
}
TWO = ("replicate=2", "shard=2", "tensor=2", "pipeline=2")
FOUR = tuple(" ".join(pair) for pair in itertools.combinations(TWO, 2)) + ("shard=4", "tensor=4", "pipeline=4")


def given(model: str) -> TrainConfig:
    base = TrainConfig(optim={"name": "adamw", "lr": 2e-3}, clip={"mode": "dynamic", "max_norm": 0.5}, ema=0.9, epochs=3)
    common = {"accumulate": 4, "precision": "fp32", "channels_last": False, "checkpoint.every_epochs": 0}
    return base.override({**MODELS[model], **common}).override({"data.batch_size": 32})


def sizes(mesh: str) -> dict[str, int]:
    return {name: int(size) for name, size in (part.split("=") for part in mesh.split())}


def ranks(mesh: str) -> int:
    return int(np.prod(list(sizes(mesh).values()), dtype=int))


def on(config: TrainConfig, mesh: str, root: str, stop: int = 0) -> Run:
    count = ranks(mesh)
    device = "cuda" if torch.cuda.device_count() >= count else "cpu"
    changes = {"mesh": sizes(mesh), "device": device}
    return launch(config.override(changes), count, root=root, replay=[(stop, "stop", {})] if stop else None).wait(timeout=300)


def furthest(one: Run, other: Run) -> str:
    assert len(one.history) == len(other.history)
    apart = {name: np.nanmax(np.abs(one.history[name] - other.history[name])) for name in ("loss", "val_loss")}
    return ", ".join(f"{name} {value:.1e}" for name, value in apart.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="bert")
    parser.add_argument("--meshes", nargs="+", default=[*TWO, *FOUR])
    parser.add_argument("--checkpoints", action="store_true")
    arguments = parser.parse_args()
    config = given(arguments.model)
    with tempfile.TemporaryDirectory() as root:
        one = train(config.override({"device": "cuda" if torch.cuda.is_available() else "cpu"}), root=root).run
        first, last = one.history["loss"].iloc[0], one.history["loss"].iloc[-1]
        print(f"{arguments.model}: losses {first:.3f} … {last:.3f} over {len(one.history)} steps of one process", flush=True)
        for mesh in arguments.meshes:
            start = time.monotonic()
            run = on(config, mesh, root)
            print(f"{mesh:<24} largest difference: {furthest(one, run)}   ({time.monotonic() - start:.0f} s)", flush=True)
        for before, after in itertools.permutations(("", *TWO), 2) if arguments.checkpoints else ():
            if before:
                run = on(config, before, root, stop=11)
                run.resume(ranks(after) if after else 1, mesh=sizes(after) if after else {}).wait(timeout=300)
                print(f"{before:<12} → {after or 'one process':<12} {furthest(one, run)}", flush=True)


if __name__ == "__main__":
    main()
