"""Rules on memory: a leak."""

from __future__ import annotations

import numpy as np

from workbench.diagnosis.base import Tables, finding, last_step, rule
from workbench.events import Finding

READINGS, SPAN = 40, 5
"""Fewest readings that show growth, and readings apart of two that are compared."""
GROWTH = 48 * 2**20
"""Bytes of growth over these readings below which nothing is said."""


@rule
def memory_leak(tables: Tables) -> list[Finding]:
    """What is allocated grows step over step, evenly, beyond its noise; the first quarter of the readings is not counted.

    What fills once (caches, libraries loaded late) grows ever more slowly, and in jumps. A leak grows at every pair of readings
    alike: the median growth over a few readings is near the mean one, early and late, and a line explains nearly all of it.
    """
    memory = tables.memory
    if memory.empty or "allocated" not in memory:
        return []
    for rank, rows in memory.groupby("rank"):
        by_step = rows.drop_duplicates("step").sort_values("step")
        settled = by_step.iloc[len(by_step) // 4 :]
        step, used = settled["step"].to_numpy(dtype="f8"), settled["allocated"].to_numpy(dtype="f8")
        if len(used) < READINGS or used[-1] - used[0] < max(GROWTH, 0.02 * used[0]):
            continue
        slope, base = np.polyfit(step, used, 1)
        left = used - (slope * step + base)
        paces = (used[SPAN:] - used[:-SPAN]) / (step[SPAN:] - step[:-SPAN])
        slowest = min(float(np.median(part)) for part in np.array_split(paces, 3))
        if 1 - left.var() / used.var() < 0.95 or slowest < 0.4 * slope:
            continue
        total = float(rows["total"].iloc[-1]) if "total" in rows else 0.0
        ends = f"; at this pace it is full in {(total - used[-1]) / slope:,.0f} steps" if total > used[-1] else ""
        message = (
            f"Memory leaks on rank {rank}: {slope / 2**20:.3g} MiB more each step, {used[-1] / 2**20:,.0f} MiB now{ends}. "
            "Something keeps tensors of every step: look for lists of losses or outputs, and detach() what they hold."
        )
        return finding(tables, "memory_leak", "warning", last_step(rows), message)
    return []
