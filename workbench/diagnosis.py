"""Readings → findings in words, each with a remedy: a dict of config overrides.

:func:`diagnose` runs every rule of :data:`RULES` over a run's tables (those of :class:`workbench.run.Run`: ``history`` and the
readings ``gradients``, ``activations`` and ``communication``). A rule is a pure function from :class:`Tables` to findings, one
a fault: it names the worst layer and counts the others. Thresholds look at the recent readings only, so a fault that was cured
is not reported.

A rule is added by decorating it with :func:`rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.events import Finding

if TYPE_CHECKING:
    import pandas as pd

RECENT = 5
"""Readings that count as recent."""

SLOW_NETWORK = 10.0
"""Gb/s below which a network between hosts holds training back."""

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Tables:
    """What rules look at; each may be empty. Readings of several ranks may be mixed."""

    history: pd.DataFrame
    gradients: pd.DataFrame
    activations: pd.DataFrame
    communication: pd.DataFrame

    @property
    def lr(self) -> float:
        """The highest learning rate so far, the peak that ``optim.lr`` sets; 0 when unknown."""
        known = self.history["lr"].max() if "lr" in self.history and len(self.history) else 0.0
        return float(known) if known == known else 0.0

    def slower(self, factor: float) -> dict[str, Any]:
        """The override that divides the learning rate."""
        return {"optim.lr": float(f"{self.lr / factor:.2g}")} if self.lr > 0 else {}


Rule = Callable[[Tables], list[Finding]]
RULES: dict[str, Rule] = {}
"""Rules by name; a finding carries the name of its rule."""


def rule(function: Rule) -> Rule:
    """Register a rule under its function's name."""
    RULES[function.__name__] = function
    return function


def diagnose(
    history: pd.DataFrame | None = None,
    gradients: pd.DataFrame | None = None,
    activations: pd.DataFrame | None = None,
    communication: pd.DataFrame | None = None,
) -> list[Finding]:
    """What is wrong with a run, worst first; empty when nothing is.

    Args:
        history: ``run.history``.
        gradients: ``run.readings("gradients")``.
        activations: ``run.readings("activations")``.
        communication: ``run.readings("communication")``.

    Example:
        >>> for finding in diagnose(run.history, run.readings("gradients"), run.readings("activations")):
        ...     print(finding.severity, finding.message, finding.remedy)
    """
    import pandas as pd

    tables = Tables(*(pd.DataFrame() if t is None else t for t in (history, gradients, activations, communication)))
    found = [finding for check in RULES.values() for finding in check(tables)]
    return sorted(found, key=lambda f: SEVERITIES.index(f.severity))


# -- the loss ---------------------------------------------------------------------------------------------------------


@rule
def non_finite_loss(tables: Tables) -> list[Finding]:
    """The loss became NaN or infinite."""
    history = tables.history
    if "loss" not in history or history.empty:
        return []
    broken = history[~_finite(history["loss"])]
    if broken.empty or (len(broken) < 3 and _finite(history["loss"]).iloc[-1]):
        return []
    first = int(broken["step"].iloc[0])
    message = f"The loss is not a finite number in {len(broken)} of {len(history)} steps, first at step {first}."
    return [_finding("non_finite_loss", "error", first, message, {**tables.slower(10), "clip.mode": "fixed"})]


@rule
def diverging_loss(tables: Tables) -> list[Finding]:
    """The loss rises well above its best, and above where it began or on and on."""
    loss = _smooth_loss(tables.history)
    if len(loss) < 30:
        return []
    best, now, start = float(loss.min()), float(loss.iloc[-1]), float(loss.iloc[:5].median())
    noise = float(tables.history["loss"].diff().abs().median())
    quarter = loss.iloc[-max(5, len(loss) // 8) :]
    rising = float(quarter.iloc[-1]) > float(quarter.iloc[0]) + noise
    if now > best + 5 * noise and ((now > 2 * best and rising and now > 0.5 * start) or now > 1.5 * start):
        step = int(tables.history["step"].iloc[-1])
        message = f"The loss diverges: it is {now:.3g}, after a best of {best:.3g}."
        remedy = {**tables.slower(5), "clip.mode": "dynamic", "schedule.warmup": 0.1}
        return [_finding("diverging_loss", "error", step, message, remedy)]
    return []


@rule
def plateau(tables: Tables) -> list[Finding]:
    """The loss stays near where it began: nothing is learnt. A loss that has fallen and levelled out is no fault."""
    loss = _smooth_loss(tables.history)
    if len(loss) < 150:
        return []
    start, half = float(loss.iloc[:5].median()), loss.iloc[len(loss) // 2 :]
    third = len(half) // 3
    before, after = float(half.iloc[:third].median()), float(half.iloc[-third:].median())
    if start > 0 and after > 0.8 * start and abs(before - after) < 0.02 * abs(before):
        step = int(tables.history["step"].iloc[-1])
        message = f"The loss has hardly moved in {len(loss)} steps: {start:.3g} at first, {after:.3g} now."
        timid = 0 < tables.lr < 1e-4
        remedy: dict[str, Any] = {"optim.lr": 1e-3} if timid else {"optim.name": "adamw", "optim.lr": 1e-3}
        return [_finding("plateau", "warning", step, message, remedy)]
    return []


# -- gradients --------------------------------------------------------------------------------------------------------


@rule
def non_finite_gradients(tables: Tables) -> list[Finding]:
    """Gradients hold NaN or infinities, more than the odd step that loss scaling skips."""
    return _non_finite(tables.gradients, "non_finite_gradients", "gradient", {**tables.slower(5), "clip.mode": "fixed"})


@rule
def exploding_gradients(tables: Tables) -> list[Finding]:
    """The whole gradient is far larger than the weights, or far larger than it was."""
    gradients = tables.gradients
    if gradients.empty:
        return []
    known = gradients[_finite(gradients["norm"])]
    squares = known.assign(g=known["norm"] ** 2, w=known["weight_norm"] ** 2).groupby(["step", "rank"])[["g", "w"]].sum()
    total = (squares**0.5).groupby("step").max()
    if len(total) < 2:
        return []
    recent, earlier = total.iloc[-3:], total.iloc[:-3]
    now, weights = float(recent["g"].median()), float(recent["w"].median())
    grown = len(earlier) >= 3 and now > 50 * float(earlier["g"].median()) and now > 0.1 * weights
    if not (weights > 0 and now > 10 * weights) and not grown:
        return []
    last = known[known["step"].isin(total.index[-3:])]
    worst = str(last.groupby("layer")["norm"].median().idxmax())
    against = f"{now / weights:.3g} times the weights'" if weights > 0 else "while the weights are zero"
    message = f"Gradients explode: their norm is {now:.3g}, {against}; most of it in {worst}."
    remedy = {"clip.mode": "dynamic", **tables.slower(5)}
    return [_finding("exploding_gradients", "error", int(total.index[-1]), message, remedy, worst)]


@rule
def vanishing_gradients(tables: Tables) -> list[Finding]:
    """Some weights get a vanishing gradient, relative to their size, beside the typical layer's.

    Biases are left out: before a normalization their gradient is zero by construction.
    """
    recent = _recent(tables.gradients)
    if recent.empty or recent["step"].nunique() < 3:
        return []
    weights = recent[recent["layer"].str.endswith("weight") & _finite(recent["norm"]) & (recent["weight_norm"] > 1e-8)]
    if weights.empty:
        return []
    ratio = (weights["norm"] / weights["weight_norm"]).groupby(weights["layer"], sort=False).median()
    typical = float(ratio.quantile(0.75))
    starved = ratio[ratio < max(1e-4 * typical, 1e-12)].sort_values()
    if len(ratio) < 3 or typical <= 0 or starved.empty:
        return []
    share = float(starved.iloc[0]) / typical
    one = len(starved) == 1
    size = f"{share:.1g} of the typical layer's gradient, relative to {'its' if one else 'their'} weights"
    got = size if share > 0 else "no gradient at all"
    message = f"Gradients vanish: {_names(list(starved.index))} {'gets' if one else 'get'} {got}."
    remedy = {"optim.name": "adamw", "optim.lr": 1e-3}
    return [_finding("vanishing_gradients", "warning", int(recent["step"].max()), message, remedy, str(starved.index[0]))]


# -- activations ------------------------------------------------------------------------------------------------------


@rule
def non_finite_activations(tables: Tables) -> list[Finding]:
    """Layers put out NaN or infinities."""
    return _non_finite(tables.activations, "non_finite_activations", "output", {**tables.slower(5), "precision": "fp32"})


@rule
def overflowing_activations(tables: Tables) -> list[Finding]:
    """Values come near the largest number that fp16 holds, 65,504."""
    latest = _by_layer(tables.activations)
    if latest.empty:
        return []
    largest = latest[["min", "max"]].abs().max(axis=1).where(latest["nonfinite"] == 0)
    near = largest[largest > 3e4].sort_values(ascending=False)
    if near.empty:
        return []
    message = f"Activations reach {near.iloc[0]:.3g} in {_names(list(near.index))}; fp16 overflows at 65,504."
    remedy = {**tables.slower(3), "precision": "bf16"}
    return [_finding("overflowing_activations", "warning", _last(tables.activations), message, remedy, str(near.index[0]))]


@rule
def dead_activations(tables: Tables) -> list[Finding]:
    """A layer puts out zeros, or one value, for every input."""
    latest = _by_layer(tables.activations)
    if latest.empty or tables.activations["step"].nunique() < 2:
        return []
    dead = latest[(latest["zeros"] > 0.99) | ((latest["std"] == 0) & (latest["count"] > 8))].sort_values("zeros", ascending=False)
    if dead.empty:
        return []
    verb = "is" if len(dead) == 1 else "are"
    message = f"Dead units: {_names(list(dead.index))} {verb} zero or constant for at least 99 % of the values."
    remedy = {**tables.slower(3), "schedule.warmup": 0.1}
    return [_finding("dead_activations", "warning", _last(tables.activations), message, remedy, str(dead.index[0]))]


@rule
def saturated_activations(tables: Tables) -> list[Finding]:
    """A bounded activation (tanh, sigmoid) sits at its bounds, where it passes no gradient.

    With |v| ≤ 1, a mean square near 1 means values at ±1; with 0 ≤ v ≤ 1, a mean of v (1 - v) near 0 means values at 0 or 1.
    """
    latest = _by_layer(tables.activations)
    if latest.empty:
        return []
    square = latest["std"] ** 2 + latest["mean"] ** 2
    tanh = (latest["min"] >= -1) & (latest["min"] < -0.5) & (latest["max"] <= 1) & (square > 0.9)
    sigmoid = (latest["min"] >= 0) & (latest["max"] <= 1) & (latest["max"] > 0.99) & (latest["mean"] - square < 0.02)
    stuck = latest[tanh | (sigmoid & (latest["zeros"] < 0.5) & (latest["std"] > 0))]
    if stuck.empty:
        return []
    verb = "sits" if len(stuck) == 1 else "sit"
    message = f"Saturated units: {_names(list(stuck.index))} {verb} at the bounds of the activation, where no gradient passes."
    remedy = {**tables.slower(3), "schedule.warmup": 0.1}
    return [_finding("saturated_activations", "warning", _last(tables.activations), message, remedy, str(stuck.index[0]))]


# -- where a step's time goes ------------------------------------------------------------------------------------------


@rule
def slow_rank(tables: Tables) -> list[Finding]:
    """The other ranks wait for one that takes longer over its own work."""
    typical = _by_rank(tables.communication)
    if len(typical) < 2:
        return []
    busy = typical["busy"].sort_values()
    slow, own = int(busy.index[-1]), float(busy.iloc[-1])
    others, idle = float(busy.iloc[:-1].median()), float(typical["exposed"].drop(slow).median())
    step = own + float(typical["exposed"][slow])
    if own < 1.2 * others or idle < 0.1 * step:
        return []
    waits = float(typical["waited"][slow]) > 0.5 * (own - others)
    why = ", mostly waiting for samples" if waits else ""
    message = (
        f"Rank {slow} takes {1000 * own:.3g} ms over its part of a step{why}, the others {1000 * others:.3g} ms: "
        f"they wait {100 * idle / step:.0f} % of the time."
    )
    remedy = {"data.placement": "device"} if waits else {"balance.shares": "speed"}
    return [_finding("slow_rank", "warning", _last(tables.communication), message, remedy)]


@rule
def slow_network(tables: Tables) -> list[Finding]:
    """Every rank waits for gradients, and between their hosts lies a slow network."""
    share, seconds, payload, network = _on_the_wire(tables.communication)
    if share < 0.05 or not network < SLOW_NETWORK:
        return []
    message = (
        f"A network of {network:.3g} Gb/s links the hosts: all ranks wait for {payload / 1e6:.3g} MB of gradients a step, "
        f"{1000 * seconds:.3g} ms or {100 * share:.0f} % of it."
    )
    remedy = {"communication.compress": "powersgd"}
    return [_finding("slow_network", "warning", _last(tables.communication), message, remedy)]


@rule
def exposed_communication(tables: Tables) -> list[Finding]:
    """Every rank waits for gradients on the wire, the one that computes longest too; unless a slow network is why."""
    share, seconds, payload, network = _on_the_wire(tables.communication)
    if share < 0.15 or network < SLOW_NETWORK:
        return []
    what = f"{payload / 1e6:.3g} MB of gradients" if payload else "gradients on the wire"
    message = f"All ranks wait for {what} for {1000 * seconds:.3g} ms of each step, {100 * share:.0f} % of it."
    remedy = {"communication.compress": "bf16", "communication.bucket": "auto"}
    return [_finding("exposed_communication", "warning", _last(tables.communication), message, remedy)]


@rule
def starved_step(tables: Tables) -> list[Finding]:
    """Every rank spends much of its steps waiting for samples."""
    typical = _by_rank(tables.communication)
    if typical.empty:
        return []
    share = float((typical["waited"] / (typical["busy"] + typical["exposed"])).min())
    if share < 0.2:
        return []
    message = f"Steps wait for samples {100 * share:.0f} % of the time."
    remedy = {"data.placement": "device", "data.workers": 8}
    return [_finding("starved_step", "warning", _last(tables.communication), message, remedy)]


# -- shared -----------------------------------------------------------------------------------------------------------


Severity = Literal["info", "warning", "error"]


def _finding(name: str, severity: Severity, step: int, message: str, remedy: dict[str, Any], layer: str | None = None) -> Finding:
    return Finding(name=name, severity=severity, step=step, message=message, remedy=remedy, layer=layer)


def _non_finite(table: pd.DataFrame, name: str, what: str, remedy: dict[str, Any]) -> list[Finding]:
    recent = _recent(table)
    if recent.empty:
        return []
    broken = recent[recent["nonfinite"] > 0]
    steps = broken["step"].nunique()
    if broken.empty or (steps == 1 and recent["step"].nunique() > 2 and broken["step"].iloc[0] != recent["step"].max()):
        return []
    first = broken[broken["step"] == broken["step"].min()]
    layers = list(dict.fromkeys(first["layer"]))
    message = f"NaN or infinity in the {what} of {_names(layers)}, in {steps} of the last {recent['step'].nunique()} readings."
    return [_finding(name, "error", int(first["step"].iloc[0]), message, remedy, str(layers[0]))]


def _finite(values: pd.Series) -> pd.Series:
    return values.notna() & (values.abs() != float("inf"))


def _smooth_loss(history: pd.DataFrame) -> pd.Series:
    """Running median of the finite losses over a tenth of the run, 5 to 50 steps."""
    import pandas as pd

    if "loss" not in history or history.empty:
        return pd.Series(dtype="float64")
    loss = history["loss"][_finite(history["loss"])]
    window = min(50, max(5, len(loss) // 10))
    return loss.rolling(window, min_periods=1).median()


def _recent(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return table
    steps = table["step"].drop_duplicates().nlargest(RECENT)
    return table[table["step"].isin(steps)]


def _by_layer(activations: pd.DataFrame) -> pd.DataFrame:
    """Medians over recent readings and ranks, one row a layer, in the model's order; extremes are the widest."""
    recent = _recent(activations)
    if recent.empty:
        return recent
    how = dict.fromkeys(("count", "mean", "std", "zeros"), "median") | {"min": "min", "max": "max", "nonfinite": "max"}
    return recent.groupby("layer", sort=False).agg(how)


def _by_rank(communication: pd.DataFrame) -> pd.DataFrame:
    """Medians over recent readings, one row a rank; empty before there are three to go by."""
    known = communication[_finite(communication["busy"])] if "busy" in communication else communication
    if known.empty or known["step"].nunique() < 3:
        return known.iloc[:0]
    return _recent(known).groupby("rank")[["busy", "waited", "exposed", "payload", "network"]].median()


def _on_the_wire(communication: pd.DataFrame) -> tuple[float, float, float, float]:
    """What the rank that waits least waits, as a share of a step and in seconds; bytes it gives; Gb/s of the network or NaN."""
    typical = _by_rank(communication)
    if len(typical) < 2:
        return 0.0, 0.0, 0.0, float("nan")
    last = typical.sort_values("exposed").iloc[0]
    exposed = float(last["exposed"])
    return exposed / (float(last["busy"]) + exposed), exposed, float(typical["payload"].max()), float(typical["network"].min())


def _last(table: pd.DataFrame) -> int:
    return int(table["step"].max())


def _names(layers: Sequence[str]) -> str:
    if len(layers) <= 2:
        return " and ".join(layers)
    return f"{layers[0]} and {len(layers) - 1} more layers"
