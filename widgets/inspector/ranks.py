"""Readings of several ranks as one: rows of numbers from their tables, joined step by step, and merged.

* :func:`gradient_rows`, :func:`activation_rows` — of a table's readings.
* :class:`Join` — waits for all ranks' readings of a step; :func:`highest`, :func:`added` merge them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets.inspector.quantities import QUANTITIES, quantities_of

if TYPE_CHECKING:
    import pyarrow as pa

STATS = ("mean", "std", "zeros", "dead", "saturated")
"""Beside each distribution; the last two, shares of channels, are NaN where the probe does not tell them."""
MOMENTS = 6
"""Columns of :func:`activation_rows` before the histogram."""


def gradient_rows(table: pa.Table) -> np.ndarray:
    """[N, quantities], NaN where the table does not tell one."""
    known = {quantity.name: quantity.of(table) for quantity in quantities_of(table.column_names)}
    return np.column_stack([known.get(quantity.name, np.full(table.num_rows, np.nan)) for quantity in QUANTITIES])


def activation_rows(table: pa.Table) -> np.ndarray:
    """[N, 6 + bins]: count, mean, mean square, zeros, dead, saturated, then the histogram."""
    histogram = np.asarray(table["histogram"].combine_chunks().flatten(), dtype="f8").reshape(table.num_rows, -1)
    count, mean, std, zeros = (np.asarray(table[name], dtype="f8") for name in ("count", "mean", "std", "zeros"))
    untold = np.full(table.num_rows, np.nan)
    channels = [np.asarray(table[n], dtype="f8") if n in table.column_names else untold for n in ("dead", "saturated")]
    return np.column_stack([count, mean, std**2 + mean**2, zeros, *channels, histogram])


class Join:
    """Readings of one kind, step by step: waits for every rank known, and passes a step on once, merged.

    A step that lacks a rank is passed on when a later one is complete: that rank will not report it any more.
    """

    def __init__(self, merge: Callable[[list[Any]], Any]) -> None:
        self._merge = merge
        self._ranks: set[int] = set()
        self._waiting: dict[int, dict[int, Any]] = {}
        self._last = -1

    def put(self, step: int, rank: int, value: Any) -> None:
        self._ranks.add(rank)
        if step > self._last:
            self._waiting.setdefault(step, {})[rank] = value

    def take(self, everything: bool = False) -> Iterable[tuple[int, Any]]:
        """(step, merged) of the steps that are ready, in order."""
        complete = [step for step, by_rank in self._waiting.items() if len(by_rank) == len(self._ranks)]
        limit = max(self._waiting, default=-1) if everything else max(complete, default=-1)
        for step in sorted(s for s in self._waiting if s <= limit):
            by_rank = self._waiting.pop(step)
            self._last = step
            yield step, self._merge([by_rank[rank] for rank in sorted(by_rank)])


def highest(readings: list[np.ndarray]) -> np.ndarray:
    """Of each number the largest that a rank tells."""
    found = readings[0]
    for other in readings[1:]:
        found = np.fmax(found, other)
    return found


def added(readings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Histograms [layers, bins] added, and [layers, STATS] of the whole: means weighted by the ranks' counts."""
    count = np.nansum([r[:, :1] for r in readings], axis=0)
    told = np.nansum([r[:, 1:MOMENTS] * r[:, :1] for r in readings], axis=0) / np.maximum(count, 1)
    told[np.all([np.isnan(r[:, 1:MOMENTS]) for r in readings], axis=0)] = np.nan
    mean, square, *shares = told.T
    return np.nansum([r[:, MOMENTS:] for r in readings], axis=0), np.column_stack(
        [mean, np.sqrt(np.maximum(square - mean**2, 0)), *shares]
    )
