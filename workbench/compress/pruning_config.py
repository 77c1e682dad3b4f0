"""Settings of pruning. Importing them imports no framework, so that forms and pipelines open at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from workbench.config import Config, hint
from workbench.registry import Registry

CRITERIA = Registry(
    "pruning criterion",
    {
        "l1": "workbench.compress.pruning:l1",
        "l2": "workbench.compress.pruning:l2",
        "random": "workbench.compress.pruning:random",
    },
)
"""Pruning criteria by name: a function from a group of coupled layers to one score a channel; the lowest scores go."""


class PruneConfig(Config):
    """What to remove from a model, and how channels are ranked."""

    kind: ClassVar[str] = "prune"

    ratio: float = Field(
        0.3, gt=0, lt=1, description="Fraction of the target to remove at least, e.g. 0.3 removes 30 % of the parameters."
    )
    target: Literal["parameters", "macs"] = Field(
        "parameters", description="What the ratio counts: parameters, or multiply-accumulates of one sample."
    )
    criterion: str = Field(
        "l1", description="How channels are ranked; the lowest scores are removed.", json_schema_extra=hint(choices="criteria")
    )
    round_to: int = Field(
        1,
        ge=1,
        description="Channel counts are multiples of this; 8 or 16 run faster on most hardware, but meet the ratio less closely.",
    )
    ignored: list[str] = Field(
        default_factory=list,
        description="Layers whose outputs stay whole, as names or patterns, e.g. 'stem*'. The outputs always stay.",
    )
    seed: int = Field(0, ge=0, description="Seed of the 'random' criterion.", json_schema_extra=hint(advanced=True))

    @field_validator("criterion")
    @classmethod
    def _known(cls, name: str) -> str:
        return CRITERIA.check(name)
