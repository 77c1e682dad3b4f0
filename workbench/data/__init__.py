"""Data: cards, splits, batches, augmentations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "DataConfig": "workbench.data.config",
    "Splits": "workbench.data.splits",
    "Arrays": "workbench.data.splits",
    "load_splits": "workbench.data.splits",
    "Batches": "workbench.data.batches",
    "Shard": "workbench.data.order",
    "load_batches": "workbench.data.loading",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from workbench.data.batches import Batches
    from workbench.data.config import DataConfig
    from workbench.data.loading import load_batches
    from workbench.data.order import Shard
    from workbench.data.splits import Arrays, Splits, load_splits


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'workbench.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
