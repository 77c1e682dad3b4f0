"""How ranks of unequal speed share a batch. Light: imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from workbench.config import Config


class BalanceConfig(Config):
    """Shares of the global batch. The gradient is that of the whole batch however it is shared out.

    Batch normalization takes its statistics from a rank's own samples, so that unequal shares change them as another number of
    ranks would. By speed, two runs are equal up to rounding, not bit for bit.
    """

    shares: Literal["even", "speed"] | tuple[Annotated[float, Field(gt=0)], ...] = Field(
        "even",
        description="Each rank's share of a batch: even; speed: as fast as it proves to compute, measured while training; or a "
        "number for each rank, in proportion.",
    )
    every: int = Field(
        20,
        ge=4,
        description="Optimizer steps between two looks at the ranks' speed, for shares=speed; the first comes after as many.",
    )
    gain: float = Field(
        0.03, gt=0, lt=1, description="Shares change when a step is expected to become shorter by this part of its time."
    )
