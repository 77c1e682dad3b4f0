"""Smaller and faster models: ``prune(model, PruneConfig(), example)``, ``quantize(model, QuantConfig(), data)``.

Each verb returns a new model and leaves the given one as it is. Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.compress.compilation import compiled
    from workbench.compress.distillation import DistillConfig, distill
    from workbench.compress.gradual import GradualResult, prune_gradually
    from workbench.compress.gradual_config import GradualConfig
    from workbench.compress.mixed import layer_sensitivity, mixed_precision
    from workbench.compress.pruning import ChannelPruner, prune
    from workbench.compress.pruning_config import CRITERIA, PruneConfig
    from workbench.compress.qat import QuantAwareTraining
    from workbench.compress.quantization import Quantizer, quantize
    from workbench.compress.quantization_config import QuantConfig
    from workbench.compress.sparsity import bake_masks, semi_structured, sparsify
    from workbench.compress.sparsity_config import SparsityConfig
    from workbench.compress.sweep import Sensitivity, sensitivity

__all__ = [
    "CRITERIA",
    "ChannelPruner",
    "DistillConfig",
    "GradualConfig",
    "GradualResult",
    "PruneConfig",
    "QuantAwareTraining",
    "QuantConfig",
    "Quantizer",
    "Sensitivity",
    "SparsityConfig",
    "bake_masks",
    "compiled",
    "distill",
    "layer_sensitivity",
    "mixed_precision",
    "prune",
    "prune_gradually",
    "quantize",
    "semi_structured",
    "sensitivity",
    "sparsify",
]

_HOMES = {
    "CRITERIA": "pruning_config",
    "DistillConfig": "distillation",
    "distill": "distillation",
    "PruneConfig": "pruning_config",
    "QuantConfig": "quantization_config",
    "ChannelPruner": "pruning",
    "prune": "pruning",
    "QuantAwareTraining": "qat",
    "Quantizer": "quantization",
    "compiled": "compilation",
    "layer_sensitivity": "mixed",
    "mixed_precision": "mixed",
    "quantize": "quantization",
    "GradualConfig": "gradual_config",
    "GradualResult": "gradual",
    "prune_gradually": "gradual",
    "Sensitivity": "sweep",
    "sensitivity": "sweep",
    "SparsityConfig": "sparsity_config",
    "bake_masks": "sparsity",
    "semi_structured": "sparsity",
    "sparsify": "sparsity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
