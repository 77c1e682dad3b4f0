"""Batches for a notebook: to calibrate a quantized model with, to compare variants on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.data.batches import Batches, Shard, Target
from workbench.data.config import DataConfig
from workbench.data.splits import load_splits


def load_batches(
    config: DataConfig, split: Literal["train", "eval"] = "eval", *, seed: int = 0, root: Path | None = None
) -> list[tuple[Any, Tensor]]:
    """Batches (x, y) as a trainer on the CPU sees them, normalized.

    Args:
        config: of the data, e.g. ``run.config.data``.
        split: ``"train"``: the first epoch, shuffled and augmented; ``"eval"``: the held-out samples in order.
        seed: of order and augmentation.
        root: folder against which relative files are looked up first (a run folder).
    """
    batches = Batches(load_splits(config, root=root), config, Shard(), Target(torch.device("cpu")), seed)
    try:
        if split == "eval":
            return [(x[:count], y[:count]) for x, y, count in batches.evaluation()]
        return [batch for step in batches.epoch(0) for batch in step]
    finally:
        batches.close()
