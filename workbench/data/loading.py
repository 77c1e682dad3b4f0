"""Batches for a notebook: to calibrate a quantized model with, to compare variants on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.data.batches import Batches, Target
from workbench.data.config import DataConfig
from workbench.data.order import Shard
from workbench.data.splits import load_splits


class LoadedBatches(list[tuple[Any, Tensor]]):
    """Batches (x, y) in order, and the names of the classes, in label order, of tokens and of columns, where there are any."""

    def __init__(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        classes: tuple[str, ...] = (),
        tokens: tuple[str, ...] = (),
        columns: tuple[str, ...] = (),
    ) -> None:
        super().__init__(batches)
        self.classes, self.tokens, self.columns = classes, tokens, columns


def load_batches(
    config: DataConfig, split: Literal["train", "eval"] = "eval", *, seed: int = 0, root: Path | None = None
) -> LoadedBatches:
    """Batches (x, y) as a trainer on the CPU sees them, normalized.

    Args:
        config: of the data, e.g. ``run.config.data``.
        split: ``"train"``: the first epoch, shuffled and augmented; ``"eval"``: the held-out samples in order.
        seed: of order and augmentation.
        root: folder against which relative files are looked up first (a run folder).
    """
    splits = load_splits(config, root=root)
    batches = Batches(splits, config, Shard(), Target(torch.device("cpu")), seed)
    try:
        names = splits.classes, splits.tokens, splits.columns
        if split == "eval":
            return LoadedBatches(((x[:count], y[:count]) for x, y, count in batches.evaluation()), *names)
        return LoadedBatches((batch for step in batches.epoch(0) for batch in step), *names)
    finally:
        batches.close()
