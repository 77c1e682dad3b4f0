"""What rules see and how they speak: :class:`Tables`, :data:`RULES` and :func:`rule`, :func:`finding`, and shared arithmetic.

A remedy is a dict of config overrides. Rules give several, the best first; :func:`finding` leaves out of each what the run's
config already says, so that no advice is to do what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from workbench.config import Config
from workbench.events import Finding

if TYPE_CHECKING:
    import pandas as pd

RECENT = 5
"""Readings that count as recent."""

SEVERITIES = ("error", "warning", "info")
Severity = Literal["error", "warning", "info"]
Remedy = dict[str, Any]
"""Config overrides by dotted name."""


@dataclass(frozen=True)
class Tables:
    """What rules look at; each table may be empty or lack columns. Readings of several ranks may be mixed.

    Attributes:
        history, gradients, activations, communication, memory: as :class:`workbench.run.Run` gives them.
        config: the run's, with what was changed while it ran; None when unknown.
    """

    history: pd.DataFrame
    gradients: pd.DataFrame
    activations: pd.DataFrame
    communication: pd.DataFrame
    memory: pd.DataFrame
    config: Config | None = None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The config's settings by dotted name; empty when it is unknown."""
        return {} if self.config is None else self.config.flat()

    @cached_property
    def lr(self) -> float:
        """The peak learning rate, as ``optim.lr`` sets it: of the config, else the highest so far; 0 when unknown."""
        if "optim.lr" in self.settings:
            return float(self.settings["optim.lr"])
        known = self.history["lr"].max() if "lr" in self.history and len(self.history) else 0.0
        return float(known) if known == known else 0.0

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer's updates are free of the gradients' scale, as Adam's are."""
        return str(self.settings.get("optim.name", "")) in ("adam", "adamw", "nadam", "radam", "dynamic_graph", "rmsprop")

    def slower(self, factor: float) -> Remedy:
        """The override that divides the learning rate."""
        return {"optim.lr": float(f"{self.lr / factor:.2g}")} if self.lr > 0 else {}

    def multiplied(self, name: str, factor: int, default: int) -> Remedy:
        """The override that multiplies a whole number."""
        return {name: int(self.settings.get(name, default)) * factor}


Rule = Callable[[Tables], list[Finding]]
RULES: dict[str, Rule] = {}
"""Rules by name; a finding carries the name of its rule."""


def rule(function: Rule) -> Rule:
    """Register a rule under its function's name."""
    RULES[function.__name__] = function
    return function


def finding(
    tables: Tables, name: str, severity: Severity, step: int, message: str, *remedies: Remedy, layer: str | None = None
) -> list[Finding]:
    """One finding. Of its remedies, what the run's settings already are is left out; one that is all so, altogether."""
    changes: list[Remedy] = []
    for remedy in remedies:
        change = {key: value for key, value in remedy.items() if tables.settings.get(key, changes) != value}
        if change and change not in changes:
            changes.append(change)
    first = changes[0] if changes else {}
    return [
        Finding(
            name=name, severity=severity, step=step, message=message, layer=layer, remedy=first, alternatives=tuple(changes[1:])
        )
    ]


# -- shared arithmetic --------------------------------------------------------------------------------------------------


def finite(values: pd.Series) -> pd.Series:
    """Which of the values are numbers."""
    return values.notna() & (values.abs() != float("inf"))


def smooth_loss(history: pd.DataFrame) -> pd.Series:
    """Running median of the finite losses over a tenth of the run, 5 to 50 steps."""
    import pandas as pd

    if "loss" not in history or history.empty:
        return pd.Series(dtype="float64")
    loss = history["loss"][finite(history["loss"])]
    window = min(50, max(5, len(loss) // 10))
    return loss.rolling(window, min_periods=1).median()


def first_loss(history: pd.DataFrame) -> float:
    """The loss that the run began with; 0 when there is none.

    The median of its first five, or the very first, which no step has yet moved, where that is lower.
    """
    if "loss" not in history or not finite(history["loss"]).any():
        return 0.0
    loss = history["loss"][finite(history["loss"])]
    return min(float(loss.iloc[:5].median()), float(loss.iloc[0]))


def recent(table: pd.DataFrame, readings: int = RECENT) -> pd.DataFrame:
    """The rows of the last readings."""
    if table.empty:
        return table
    steps = table["step"].drop_duplicates().nlargest(readings)
    return table[table["step"].isin(steps)]


def last_step(table: pd.DataFrame) -> int:
    """The step of the last reading."""
    return int(table["step"].max())


def named(layers: Sequence[str]) -> str:
    """Layers in words: one or two by name, of more the first and their number."""
    if len(layers) <= 2:
        return " and ".join(layers)
    return f"{layers[0]} and {len(layers) - 1} more layers"


def non_finite(tables: Tables, table: pd.DataFrame, name: str, what: str, *remedies: Remedy) -> list[Finding]:
    """A finding where recent readings hold NaN or infinity; in fp16, more than the odd step that loss scaling skips."""
    rows = recent(table)
    if rows.empty:
        return []
    broken = rows[rows["nonfinite"] > 0]
    steps = broken["step"].nunique()
    scaled = tables.settings.get("precision", "fp16") == "fp16"
    odd = steps == 1 and rows["step"].nunique() > 2 and broken["step"].iloc[0] != rows["step"].max()
    if broken.empty or (scaled and odd):
        return []
    first = broken[broken["step"] == broken["step"].min()]
    layers = list(dict.fromkeys(first["layer"]))
    message = f"NaN or infinity in the {what} of {named(layers)}, in {steps} of the last {rows['step'].nunique()} readings."
    return finding(tables, name, "error", int(first["step"].iloc[0]), message, *remedies, layer=str(layers[0]))
