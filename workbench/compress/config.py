"""Settings of pruning and quantization. Importing them imports no framework, so that forms and pipelines open at once."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

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


class QuantConfig(Config):
    """How a model's numbers are stored and multiplied in INT8."""

    kind: ClassVar[str] = "quantize"

    mode: Literal["static", "dynamic", "qat"] = Field(
        "static",
        description="static: activation ranges come from calibration samples (convolutions and linear layers); dynamic: they are "
        "measured at each call (linear layers); qat: ranges and weights are learned by fine-tuning.",
    )
    activation_bit: Literal[7, 8] = Field(
        8, description="Bits of an activation; 7 avoids saturated sums on CPUs without VNNI or AMX instructions."
    )
    weight_bit: Literal[8] = Field(8, description="Bits of a weight.")
    quant_scheme: Literal["symmetric"] = Field(
        "symmetric",
        description="Weights: zero is stored as 0, one scale an output channel. Activations always have a zero point where they "
        "can be negative, as the CPU's INT8 kernels expect.",
    )
    calibration_samples: int = Field(256, ge=1, description="Samples, at most, from which activation ranges are taken (static).")

    @model_validator(mode="after")
    def _bits_fit_the_mode(self) -> Self:
        if self.mode == "dynamic" and self.activation_bit != 8:
            raise ValueError(f"activation_bit={self.activation_bit} is for mode='static'; dynamic activations have 8 bits")
        return self
