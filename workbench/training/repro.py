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

MODEL = "source/model"
"""Where a run folder keeps the module that a run was given."""
_SOURCES = ("model.name", "data.name", "loss.name", "optim.name")
_PACKAGES = ("workbench", "torch", "torchvision", "torchao", "torch-pruning", "timm", "numpy", "pandas", "scikit-learn")


def code(config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> str:
    """Python that repeats a run, the changes made while it ran included.

    Files that the run was given are taken from its folder, which holds them as they were.
    """
    changes: list[tuple[int, str, dict[str, float]]] = []
    for event in said:
        if isinstance(event, events.AttemptStarted):
            changes = [change for change in changes if change[1] != "stop"]  # it was resumed
        elif isinstance(event, events.CommandApplied) and event.name in ("set", "stop"):
            changes.append((event.step, event.name, dict(event.settings)))
    kept = {name: value for name, value in config.flat().items() if name in _SOURCES and (kept_name(value) != value or value == MODEL)}
    lines, replay = [], f", replay={changes!r}" if changes else ""
    verb, more = ("train", "") if nproc == 1 else ("launch", f", nproc={nproc}")
    if kept:
        lines += ["from pathlib import Path", ""]
    lines += [f"from workbench import TrainConfig, {verb}", ""]
    if kept:
        lines += ["here = Path(__file__).resolve().parent"]
    lines += [f"config = {config.to_code()}"]
    lines += [f'config = config.override({{"{name}": f"{{here}}/{kept_name(value)}"}})' for name, value in kept.items()]
    lines += [f"result = {verb}(config{more}{replay})"]
    return "\n".join(lines) + "\n"


def kept_name(name: str) -> str:
    """Where the run folder keeps the Python file that an import path names; other names as they are."""
    location, colon, attribute = name.partition(":")
    return f"source/{Path(location).name}{colon}{attribute}" if location.endswith(".py") else name


def write_code(folder: Path, config: TrainConfig, said: Iterable[events.Event] = (), nproc: int = 1) -> None:
    write_atomic(folder / "repro.py", code(config, said, nproc))


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
