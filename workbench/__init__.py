"""An interactive deep-learning workbench: one engine behind panels, notebooks, pipelines and the command line.

``import workbench`` is cheap: names are loaded on first use, and neither torch nor pandas before one needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "TrainConfig": "workbench.training.config",
    "train": "workbench.training",
    "launch": "workbench.run",
    "launch_script": "workbench.cluster",
    "Run": "workbench.run",
    "apply": "workbench.remedies",
    "findings_of": "workbench.diagnosis",
    "WorkbenchError": "workbench.errors",
    "PruneConfig": "workbench.compress.pruning_config",
    "QuantConfig": "workbench.compress.quantization_config",
    "prune": "workbench.compress",
    "quantize": "workbench.compress",
    "Quantizer": "workbench.compress",
    "QuantAwareTraining": "workbench.compress",
    "ChannelPruner": "workbench.compress",
    "CompareConfig": "workbench.comparison",
    "compare": "workbench.comparison",
    "load_model": "workbench.artefact",
    "save_model": "workbench.artefact",
    "load_ipython_extension": "workbench.notebook",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from workbench.artefact import load_model, save_model
    from workbench.cluster import launch_script
    from workbench.comparison import CompareConfig, compare
    from workbench.compress import ChannelPruner, QuantAwareTraining, Quantizer, prune, quantize
    from workbench.compress.pruning_config import PruneConfig
    from workbench.compress.quantization_config import QuantConfig
    from workbench.diagnosis import findings_of
    from workbench.errors import WorkbenchError
    from workbench.notebook import load_ipython_extension
    from workbench.remedies import apply
    from workbench.run import Run, launch
    from workbench.training import train
    from workbench.training.config import TrainConfig


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
