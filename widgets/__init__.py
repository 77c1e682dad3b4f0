"""Panels over the engine: configure, train, inspect, prune, quantize, compare, explain.

Importing this package loads no framework; each name is loaded on first use. Everything a panel shows lies in run folders, and
everything a panel does is code that it shows (see :mod:`widgets.panel`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Workbench": "widgets.workbench",
    "TrainPanel": "widgets.train",
    "Inspector": "widgets.inspector",
    "PrunePanel": "widgets.prune",
    "QuantizePanel": "widgets.quantize",
    "ComparePanel": "widgets.compare",
    "Explain": "widgets.explain",
    "RunList": "widgets.runs",
    "LivePlot": "widgets.live_plot",
    "Form": "widgets.form",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from widgets.compare import ComparePanel
    from widgets.explain import Explain
    from widgets.form import Form
    from widgets.inspector import Inspector
    from widgets.live_plot import LivePlot
    from widgets.prune import PrunePanel
    from widgets.quantize import QuantizePanel
    from widgets.runs import RunList
    from widgets.train import TrainPanel
    from widgets.workbench import Workbench


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'widgets' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
