"""Variants of a model side by side: what each one costs, and what it is worth.

* :func:`compare` — measures every variant on the same data, in the form in which it would be deployed.
* :class:`Comparison` — the result: a table, warnings in words, a figure, a page.

Accuracy, agreement and divergence come from the very form that is timed. Latencies of all variants are taken in turns, so that
a busy moment of the machine falls on all alike. Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.comparison.config import CompareConfig
    from workbench.comparison.measure import compare, wilson
    from workbench.comparison.result import Comparison, Measurement

__all__ = ["CompareConfig", "Comparison", "Measurement", "compare", "wilson"]

_HOMES = {"CompareConfig": "config", "Comparison": "result", "Measurement": "result", "compare": "measure", "wilson": "measure"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
