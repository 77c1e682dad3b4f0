"""What it takes to repeat a run: ``repro.py`` and ``environment.json``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from workbench import events
from workbench.distributed import World
from workbench.storage import write_atomic
from workbench.training.config import TrainConfig

_PACKAGES = ("workbench", "torch", "torchvision", "torchao", "torch-pruning", "timm", "numpy", "pandas", "scikit-learn")


def code(config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> str:
    """Python that repeats a run, the changes made while it ran included."""
    changes = [
        (event.step, event.name, dict(event.settings))
        for event in said
        if isinstance(event, events.CommandApplied) and event.name in ("set", "stop")
    ]
    replay = f", replay={changes!r}" if changes else ""
    start = f"train(config{replay})" if nproc == 1 else f"launch(config, nproc={nproc})"
    name = start.partition("(")[0]
    return f"from workbench import TrainConfig, {name}\n\nconfig = {config.to_code()}\nresult = {start}\n"


def write_code(folder: Path, config: TrainConfig, said: Iterable[events.Event] = ()) -> None:
    write_atomic(folder / "repro.py", code(config, said))


def write_environment(folder: Path, world: World) -> None:
    """Facts from a fixed list, never the environment's variables: these may hold secrets."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    write_atomic(folder / "environment.json", json.dumps(facts, indent=2))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
