"""How a training step's memory is kept down. Light: imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from workbench.config import Config, hint


class MemoryConfig(Config):
    """What is computed twice or kept in main memory, so that a step takes less of the device's.

    Gradients stay what they are: the same dropout masks, the same batch statistics.
    """

    recompute: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Share of the model's repeated blocks, the first ones, that keep no activations and compute them again in "
        "the backward pass: less memory, up to a third more time; auto: as few as stay under the budget.",
    )
    offload: Literal["auto", "none", "activations", "optimizer", "both"] = Field(
        "none",
        description="What waits in main memory while the GPU does not need it: activations between forward and backward pass, "
        "the optimizer's state between updates; auto: what short steps show to be fastest under the budget.",
        json_schema_extra=hint(advanced=True),
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="GiB that a rank's step may take at its peak: weights, gradients, optimizer state and activations. It bounds "
        "what auto chooses; by default nine tenths of what the device has free.",
    )
