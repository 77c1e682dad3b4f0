"""Rules on the gradients: not finite, exploding, vanishing, lost in fp16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.diagnosis.base import Remedy, Tables, finding, finite, last_step, named, non_finite, recent, rule
from workbench.events import Finding

if TYPE_CHECKING:
    import pandas as pd

STARVED = 5e-3
"""Share of the typical layer's relative gradient below which a layer is starved; 0.03 at least in healthy ResNets."""
TYPICAL_UPDATE = 1e-3
"""Of a healthy step, ||dw|| / ||w||: Karpathy, CS231n notes, Neural Networks Part 3, "Ratio of weights:updates"."""
ADAM_EPSILON = 1e-8
"""Gradients smaller than this move no weight under Adam either (Kingma & Ba 2014, arXiv:1412.6980, algorithm 1)."""


@rule
def non_finite_gradients(tables: Tables) -> list[Finding]:
    """Gradients hold NaN or infinities, more than the odd step that loss scaling skips."""
    remedies: list[Remedy] = [{**tables.slower(factor), "clip.mode": "fixed"} for factor in (5, 100)]
    if tables.settings.get("precision") == "fp16":
        remedies.insert(0, {"precision": "bf16"})
    return non_finite(tables, tables.gradients, "non_finite_gradients", "gradient", *remedies)


@rule
def exploding_gradients(tables: Tables) -> list[Finding]:
    """The whole gradient is far larger than the weights, or far larger than it was."""
    gradients = tables.gradients
    if gradients.empty:
        return []
    known = gradients[finite(gradients["norm"])]
    squares = known.assign(g=known["norm"] ** 2, w=known["weight_norm"] ** 2).groupby(["step", "rank"])[["g", "w"]].sum()
    total = (squares**0.5).groupby("step").max()
    if len(total) < 2:
        return []
    latest, earlier = total.iloc[-3:], total.iloc[:-3]
    now, weights = float(latest["g"].median()), float(latest["w"].median())
    grown = len(earlier) >= 3 and now > 50 * float(earlier["g"].median()) and now > 0.1 * weights
    if not (weights > 0 and now > 10 * weights) and not grown:
        return []
    last = known[known["step"].isin(total.index[-3:])]
    worst = str(last.groupby("layer")["norm"].median().idxmax())
    against = f"{now / weights:.3g} times the weights'" if weights > 0 else "while the weights are zero"
    message = f"Gradients explode: their norm is {now:.3g}, {against}; most of it in {worst}."
    cure: Remedy = {"clip.mode": "dynamic", **tables.slower(5)}
    # Updates free of the gradients' scale; of large weights, only larger ones move much.
    others: list[Remedy] = [{"clip.mode": "fixed", "optim.name": "adamw", "optim.lr": rate} for rate in (1e-3, 1e-2)]
    return finding(tables, "exploding_gradients", "error", int(total.index[-1]), message, cure, *others, layer=worst)


@rule
def vanishing_gradients(tables: Tables) -> list[Finding]:
    """Some weights get a vanishing gradient, relative to their size, beside the typical layer's, and so don't move.

    Biases are left out: before a normalization their gradient is zero by construction. Under Adam, whose updates don't follow the
    gradients' size, a layer is starved only below its epsilon. Updates as read don't tell: weight decay moves starved layers too.
    """
    rows = recent(tables.gradients)
    if rows.empty or rows["step"].nunique() < 3:
        return []
    weights = rows[rows["layer"].str.endswith("weight") & finite(rows["norm"]) & (rows["weight_norm"] > 1e-8)]
    if weights.empty:
        return []
    by_layer = weights["layer"]
    ratio = (weights["norm"] / weights["weight_norm"]).groupby(by_layer, sort=False).median()
    typical = float(ratio.quantile(0.75))
    starved = ratio[ratio < max(STARVED * typical, 1e-12)].sort_values()
    if tables.adaptive:
        largest = weights["max"].groupby(by_layer, sort=False).median()
        starved = starved[largest[starved.index] < ADAM_EPSILON]
    if len(ratio) < 3 or typical <= 0 or starved.empty:
        return []
    share = float(starved.iloc[0]) / typical
    one = len(starved) == 1
    size = f"{share:.1g} of the typical layer's gradient, relative to {'its' if one else 'their'} weights"
    got = size if share > 0 else "no gradient at all"
    message = f"Gradients vanish: {named(list(starved.index))} {'gets' if one else 'get'} {got}."
    remedies: list[Remedy] = [{"optim.name": "adamw", "optim.lr": 1e-3}, {"optim.name": "adamw", "optim.lr": 1e-2}]
    if tables.settings.get("precision") == "fp16":
        remedies.insert(0, {"precision": "bf16"})
    return finding(tables, "vanishing_gradients", "warning", last_step(rows), message, *remedies, layer=str(starved.index[0]))


@rule
def gradient_underflow(tables: Tables) -> list[Finding]:
    """In fp16, gradients fall below its smallest number, 2^-24 after scaling, and become zero.

    Where that happens the magnitudes that remain end as if cut off: their lowest bin, at the smallest number, is well filled.
    Layers whose zeros have other reasons (units that are off, words that did not occur) have few values in theirs.
    """
    rows = recent(tables.gradients)
    if tables.settings.get("precision") != "fp16" or "histogram" not in rows or "zeros" not in rows:
        return []
    rows = rows[rows["layer"].str.endswith("weight") & (rows["nonfinite"] == 0)]
    if rows.empty or rows["step"].nunique() < 2:
        return []
    lost = rows.assign(lost=_lost(rows)).groupby("layer", sort=False)["lost"].median()
    worst = lost[lost > 0.2].sort_values(ascending=False)
    if worst.empty:
        return []
    share = f"{100 * float(worst.iloc[0]):.0f} %"
    message = (
        f"Gradients underflow in fp16: {share} of the elements of {named(list(worst.index))} fell below its smallest number."
    )
    remedies = ({"precision": "bf16"}, {"precision": "fp32"})
    name = "gradient_underflow"
    return finding(tables, name, "warning", last_step(rows), message, *remedies, layer=str(worst.index[0]))


def _lost(rows: pd.DataFrame) -> np.ndarray:
    """By row, the share of elements that are zero because the number format ends; 0 where it does not look so.

    Bins hold powers of two, so the four lowest that are in use hold what lies within a factor of 16 of the smallest number.
    """
    counts = np.stack(list(rows["histogram"]))[:, 1:].astype("f8")  # bin 0 holds the zeros
    total = counts.sum(axis=1)
    first = np.where(total > 0, (counts > 0).argmax(axis=1), 0)
    bins = np.arange(counts.shape[1])
    low = np.where((bins >= first[:, None]) & (bins < first[:, None] + 4), counts, 0).sum(axis=1)
    cut = low > 0.1 * np.maximum(total, 1)
    return np.where(cut, rows["zeros"].to_numpy(dtype="f8"), 0.0)
