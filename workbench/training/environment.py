"""The facts of machine and packages that a run ran on: ``environment.json``."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from workbench.distributed import World
from workbench.storage import write_atomic

_PACKAGES = ("workbench", "torch", "torchvision", "torchao", "torch-pruning", "timm", "numpy", "pandas", "scikit-learn")


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
