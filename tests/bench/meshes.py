"""Every mesh beside one process: how far apart the losses are, and whether a checkpoint opens on all the others.

    python -m tests.bench.meshes [--model bert | vit] [--meshes "tensor=2" "pipeline=2 shard=2"] [--checkpoints [--no-losses]]

A small BERT on made-up sentences, or a small vision transformer on digits, 24 steps of 4 micro-steps; on GPUs where there are
enough of them, else over gloo. ``--checkpoints`` stops a run half way and goes on elsewhere: between all meshes of two ranks and
one process, and from and to one process with those of four.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from workbench import Run, TrainConfig, launch, launcher, train

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


def pairs() -> list[tuple[str, str]]:
    """Where a run is stopped and where it goes on; one process has no name."""
    return [*itertools.permutations(("", *TWO), 2), *((mesh, "") for mesh in FOUR), *(("", mesh) for mesh in FOUR)]


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
    parser.add_argument("--losses", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    config = given(arguments.model)
    with tempfile.TemporaryDirectory() as root:
        one = train(config.override({"device": "cuda" if torch.cuda.is_available() else "cpu"}), root=root).run
        first, last = one.history["loss"].iloc[0], one.history["loss"].iloc[-1]
        print(f"{arguments.model}: losses {first:.3f} … {last:.3f} over {len(one.history)} steps of one process", flush=True)
        for mesh in arguments.meshes if arguments.losses else ():
            start = time.monotonic()
            run = on(config, mesh, root)
            print(f"{mesh:<24} largest difference: {furthest(one, run)}   ({time.monotonic() - start:.0f} s)", flush=True)
        stopped: dict[str, Run] = {}
        for before, after in pairs() if arguments.checkpoints else ():
            if before not in stopped:
                stopped[before] = run = on(config, before, root, stop=11)
                while launcher.at_work(run.path):
                    time.sleep(0.1)
            copy = shutil.copytree(stopped[before].path, Path(root) / f"{len(list(Path(root).iterdir()))}")
            run = Run.open(copy).resume(ranks(after), mesh=sizes(after)).wait(timeout=300)
            print(f"{before or 'one process':<20} → {after or 'one process':<20} {furthest(one, run)}", flush=True)


if __name__ == "__main__":
    main()
