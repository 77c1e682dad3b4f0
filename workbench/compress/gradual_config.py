"""Settings of pruning in steps. Importing them imports no framework."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from workbench.compress.pruning_config import PruneConfig


class GradualConfig(PruneConfig):
    """What to remove from a model in all, and by which step; training between the steps mends it."""

    kind: ClassVar[str] = "prune_gradually"

    steps: int = Field(4, ge=1, le=100, description="Times that the model is pruned and trained.")
    schedule: Literal["linear", "cubic", "geometric"] = Field(
        "linear",
        description="How much is gone after each step. linear: equal parts of the original; cubic: most at first (Zhu & Gupta "
        "2017, equation 1); geometric: an equal part of what is left.",
    )

    def progress(self, step: int) -> float:
        """The share of all that is to go that is gone after ``step`` steps, from 0 to 1."""
        share = step / self.steps
        if self.schedule == "cubic":
            return 1 - (1 - share) ** 3
        if self.schedule == "geometric" and self.ratio > 0:
            return (1 - (1 - self.ratio) ** share) / self.ratio
        return share
