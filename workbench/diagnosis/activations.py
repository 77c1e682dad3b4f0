"""Rules on what layers put out: not finite, overflowing in fp16, dead, saturated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.diagnosis.base import Remedy, Tables, finding, last_step, named, non_finite, recent, rule
from workbench.events import Finding

if TYPE_CHECKING:
    import pandas as pd

DEAD_UNITS, SATURATED_UNITS = 0.5, 0.5
"""Shares of a layer's units that are many to be dead, or stuck at a bound."""


@rule
def non_finite_activations(tables: Tables) -> list[Finding]:
    """Layers put out NaN or infinities."""
    remedies: list[Remedy] = [{**tables.slower(5), "precision": "fp32"}, {**tables.slower(100), "clip.mode": "fixed"}]
    if tables.settings.get("precision") == "fp16":
        remedies.insert(0, {"precision": "bf16"})
    return non_finite(tables, tables.activations, "non_finite_activations", "output", *remedies)


@rule
def overflowing_activations(tables: Tables) -> list[Finding]:
    """Values come near the largest number that fp16 holds, 65,504. Other precisions hold far larger ones."""
    latest = _by_layer(tables.activations)
    if latest.empty or tables.settings.get("precision", "fp16") != "fp16":
        return []
    largest = latest[["min", "max"]].abs().max(axis=1).where(latest["nonfinite"] == 0)
    near = largest[largest > 3e4].sort_values(ascending=False)
    if near.empty:
        return []
    message = f"Activations reach {near.iloc[0]:.3g} in {named(list(near.index))}; fp16 overflows at 65,504."
    return finding(
        tables,
        "overflowing_activations",
        "warning",
        last_step(tables.activations),
        message,
        {"precision": "bf16"},
        {"precision": "fp32"},
        {**tables.slower(3), "precision": "bf16"},
        layer=str(near.index[0]),
    )


@rule
def dead_activations(tables: Tables) -> list[Finding]:
    """A layer puts out zeros, or one value, for every input; or most of its units do, where units were told apart."""
    latest = _by_layer(tables.activations)
    if latest.empty or tables.activations["step"].nunique() < 2:
        return []
    whole = (latest["zeros"] > 0.99) | ((latest["std"] == 0) & (latest["count"] > 8))
    dead = latest[whole | (latest["dead"] > DEAD_UNITS)].sort_values(["dead", "zeros"], ascending=False)
    if dead.empty:
        return []
    one, worst = len(dead) == 1, dead.iloc[0]
    if whole[dead.index[0]]:
        message = (
            f"Dead units: {named(list(dead.index))} {'is' if one else 'are'} zero or constant for at least 99 % of the values."
        )
    else:
        share = f"{100 * worst['dead']:.0f} % of {'its' if one else 'the first one’s'} units put out nothing but zeros"
        message = f"Dead units: {named(list(dead.index))}: {share}."
    name, step = "dead_activations", last_step(tables.activations)
    return finding(tables, name, "warning", step, message, *_gently(tables), layer=str(dead.index[0]))


@rule
def saturated_activations(tables: Tables) -> list[Finding]:
    """A bounded activation (tanh, sigmoid) sits at its bounds, where it passes no gradient.

    With |v| ≤ 1, a mean square near 1 means values at ±1; with 0 ≤ v ≤ 1, a mean of v (1 - v) near 0 means values at 0 or 1.
    Where units were told apart, most of them at a bound.
    """
    latest = _by_layer(tables.activations)
    if latest.empty:
        return []
    square = latest["std"] ** 2 + latest["mean"] ** 2
    tanh = (latest["min"] >= -1) & (latest["min"] < -0.5) & (latest["max"] <= 1) & (square > 0.9)
    sigmoid = (latest["min"] >= 0) & (latest["max"] <= 1) & (latest["max"] > 0.99) & (latest["mean"] - square < 0.02)
    values = tanh | (sigmoid & (latest["zeros"] < 0.5) & (latest["std"] > 0))
    stuck = latest[values | (latest["saturated"] > SATURATED_UNITS)]
    if stuck.empty:
        return []
    verb = "sits" if len(stuck) == 1 else "sit"
    message = f"Saturated units: {named(list(stuck.index))} {verb} at the bounds of the activation, where no gradient passes."
    name, step = "saturated_activations", last_step(tables.activations)
    return finding(tables, name, "warning", step, message, *_gently(tables), layer=str(stuck.index[0]))


def _gently(tables: Tables) -> list[Remedy]:
    """Smaller first steps, by ever more."""
    return [{**tables.slower(factor), "schedule.warmup": 0.1} for factor in (3, 30, 300)]


def _by_layer(activations: pd.DataFrame) -> pd.DataFrame:
    """Medians over recent readings and ranks, one row a layer, in the model's order; extremes are the widest."""
    rows = recent(activations)
    if rows.empty:
        return rows
    rows = rows.assign(**{name: float("nan") for name in ("dead", "saturated") if name not in rows})
    how = dict.fromkeys(("count", "mean", "std", "zeros", "dead", "saturated"), "median")
    return rows.groupby("layer", sort=False).agg(how | {"min": "min", "max": "max", "nonfinite": "max"})
