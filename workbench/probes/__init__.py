"""Probes: what the Inspector reads of a model while it trains.

:class:`ProbeSet` holds a run's probes: attaches them, arms them on the steps that are read, and brings their readings to the
host without waiting for the device. Configs are light; the rest, which needs torch, is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workbench.probes.config import PROBES, ProbeConfig, ProbesConfig

_EXPORTS = {
    "EDGES": "workbench.probes.base",
    "Probe": "workbench.probes.base",
    "StepContext": "workbench.probes.base",
    "ProbeSet": "workbench.probes.reading",
}

__all__ = ["EDGES", "PROBES", "Probe", "ProbeConfig", "ProbeSet", "ProbesConfig", "StepContext"]

if TYPE_CHECKING:
    from workbench.probes.base import EDGES, Probe, StepContext
    from workbench.probes.reading import ProbeSet


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'workbench.probes' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
