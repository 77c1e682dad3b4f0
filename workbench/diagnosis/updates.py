"""Rules on the learning rate: how far a step moves the weights, beside what the loss makes of it.

A step typically moves weights by a thousandth of their size (:data:`workbench.diagnosis.gradients.TYPICAL_UPDATE`). Rates
differ by task, so neither rule speaks on that ratio alone: too high also needs a loss that makes no progress, too low one that
still falls, slowly. Updates are set against the schedule: a small one at the end of a cosine is no fault.
"""

from __future__ import annotations

from workbench.diagnosis.base import Remedy, Tables, finding, finite, first_loss, last_step, recent, rule, smooth_loss
from workbench.diagnosis.gradients import TYPICAL_UPDATE
from workbench.events import Finding

TOO_HIGH, TOO_LOW = 0.1, 2e-5
"""Of the typical layer, ||dw|| / ||w|| at the peak rate."""


@rule
def rate_too_high(tables: Tables) -> list[Finding]:
    """Steps moved the weights by much of their size, and the loss has not fallen since.

    The largest update of the last ten readings counts: weights that were blown up make later ones small beside them.
    """
    ratio, layer = _update(tables, 10, "max")
    loss = smooth_loss(tables.history)
    if not ratio > TOO_HIGH or len(loss) < 20:
        return []
    start, now = first_loss(tables.history), float(loss.iloc[-1])
    if now < 0.7 * start:
        return []
    message = (
        f"The learning rate is too high: a step moved the weights by {100 * ratio:.2g} % of their size, in {layer} for one, "
        f"and the loss is {now:.3g} after {start:.3g} at first."
    )
    factor = ratio / TYPICAL_UPDATE
    remedies: list[Remedy] = [{**tables.slower(f), "schedule.warmup": 0.1} for f in (max(3.0, factor / 5), factor)]
    return finding(tables, "rate_too_high", "warning", last_step(tables.gradients), message, *remedies, layer=layer)


@rule
def rate_too_low(tables: Tables) -> list[Finding]:
    """Each step moves the weights by next to nothing, and the loss has hardly fallen."""
    ratio, layer = _update(tables, 5, "median")
    loss = smooth_loss(tables.history)
    if not 0 < ratio < TOO_LOW or len(loss) < 60:
        return []
    start, now = first_loss(tables.history), float(loss.iloc[-1])
    if now < 0.7 * start:
        return []
    message = (
        f"The learning rate is too low: a step moves the weights by {ratio:.1g} of their size, in {layer} for one "
        f"(typical: {TYPICAL_UPDATE:g}), and the loss is {now:.3g} after {start:.3g} at first."
    )
    factor = min(TYPICAL_UPDATE / ratio, 1000.0)
    remedies = (tables.slower(1 / f) for f in (factor, 10 * factor))
    return finding(tables, "rate_too_low", "warning", last_step(tables.gradients), message, *remedies, layer=layer)


def _update(tables: Tables, readings: int, how: str) -> tuple[float, str]:
    """The typical layer's update at the peak rate, ``how`` of it over some readings, and a layer like it; NaN where unknown."""
    gradients, history = tables.gradients, tables.history
    if "update_ratio" not in gradients or history.empty or "lr" not in history:
        return float("nan"), ""
    rates = history.set_index("step")["lr"]
    rows = gradients[gradients["layer"].str.endswith("weight") & (gradients["weight_norm"] > 1e-8)]
    rows = rows[finite(rows["update_ratio"])]
    share = rows["step"].map(rates) / float(history["lr"].max())
    rows = rows.assign(ratio=rows["update_ratio"] / share)[share > 0.2]  # steps of the peak, not of a warm-up or of the end
    rows = recent(rows, readings)
    if rows["step"].nunique() < 3:
        return float("nan"), ""
    typical = float(rows.groupby("step")["ratio"].median().agg(how))
    nearest = int((rows["ratio"] - typical).abs().to_numpy().argmin())
    return typical, str(rows["layer"].iloc[nearest])
