"""Variants of a model side by side: what each one costs, what it is worth, and whether it comes back from disk.

* :func:`compare` — measures every variant on the same data, in the form in which it would be deployed.
* :class:`Comparison` — the result: a table, flags in words, a figure, a page, CSV.
* :func:`wilson`, :func:`paired_difference` — the intervals.

Accuracy, agreement and divergence come from the very form that is timed. Latencies of all variants are taken in turns, so that
a busy moment of the machine falls on all alike. Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.comparison.config import CompareConfig
    from workbench.comparison.intervals import paired_difference, wilson
    from workbench.comparison.measure import compare
    from workbench.comparison.result import Comparison, Measurement

__all__ = ["CompareConfig", "Comparison", "Measurement", "compare", "paired_difference", "wilson"]

_HOMES = {
    "CompareConfig": "config",
    "Comparison": "result",
    "Measurement": "result",
    "compare": "measure",
    "paired_difference": "intervals",
    "wilson": "intervals",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
