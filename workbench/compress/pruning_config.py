"""Settings of pruning. Importing them imports no framework, so that forms and pipelines open at once."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from workbench.config import Config, hint
from workbench.registry import ImportPath, Registry

CRITERIA = Registry(
    "pruning criterion",
    {
        "l1": "workbench.compress.criteria:l1",
        "l2": "workbench.compress.criteria:l2",
        "bn_scale": "workbench.compress.criteria:bn_scale",
        "taylor": "workbench.compress.criteria:taylor",
        "fpgm": "workbench.compress.criteria:fpgm",
        "lamp": "workbench.compress.criteria:lamp",
        "attribution": "workbench.compress.criteria:attribution",
        "random": "workbench.compress.criteria:random",
    },
)
"""Pruning criteria by name: a function from a group of coupled layers to one score a channel; the lowest scores go."""


class LatencyConfig(Config):
    """How latency is measured when it is the target."""

    batch: int = Field(1, ge=1, le=4096, description="Samples per call.")
    form: Literal["auto", "eager", "compiled"] = Field(
        "auto",
        description="What is timed. auto: on a CPU, compiled where there is a compiler; on CUDA, eager calls in a graph.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of matrix products and convolutions.")
    seconds: float = Field(2.0, gt=0, le=600, description="Seconds of timing for each candidate, after compiling.")
    trials: int = Field(8, ge=1, le=50, description="Candidates at most; each is compiled anew where the form is compiled.")


class PruneConfig(Config):
    """What to remove from a model, and how channels are ranked."""

    kind: ClassVar[str] = "prune"

    ratio: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Fraction of the target to remove at least, e.g. 0.3 removes 30 % of the parameters; 0 with ratios alone.",
    )
    target: Literal["parameters", "macs", "latency"] = Field(
        "parameters",
        description="What the ratio counts: parameters, multiply-accumulates of a sample, or time on the model's device.",
    )
    criterion: ImportPath = Field(
        "l1",
        description="How channels are ranked; the lowest scores are removed. taylor and attribution look at data.",
        json_schema_extra=hint(choices="criteria"),
    )
    economy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How much it counts what a channel costs: its rank is divided by what it saves of the target (latency: of "
        "the multiply-accumulates) to this power. 0 takes the same share of all layers; 0.5 more from where the target lies.",
        json_schema_extra=hint(advanced=True),
    )
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict,
        description="Fraction of a layer's channels to remove, by name or pattern, e.g. {'stages.2.*': 0.5}; "
        "the other layers give what is missing from ratio.",
        json_schema_extra=hint(advanced=True),
    )
    ignored: list[str] = Field(
        default_factory=list,
        description="Layers whose outputs stay whole, as names or patterns, e.g. 'stem*'. The model's outputs always stay.",
    )
    round_to: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        1,
        description="Channel counts are multiples of this; auto takes what the model's device computes at once. "
        "Multiples run faster, but meet the ratio less closely.",
    )
    attention: Literal["dimensions", "heads"] = Field(
        "dimensions",
        description="What attention loses: dimensions of every head, or whole heads.",
        json_schema_extra=hint(advanced=True),
    )
    max_layer_ratio: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Fraction of one layer's channels to remove at most; one always stays.",
        json_schema_extra=hint(advanced=True),
    )
    samples: int = Field(
        64, ge=1, description="Samples that taylor and attribution look at.", json_schema_extra=hint(advanced=True)
    )
    latency: LatencyConfig = Field(
        LatencyConfig(), description="How latency is measured, where it is the target.", json_schema_extra=hint(advanced=True)
    )
    seed: int = Field(0, ge=0, description="Seed of the 'random' criterion.", json_schema_extra=hint(advanced=True))

    @property
    def looks_at_data(self) -> bool:
        """Whether the criterion may need data: those that do, and those from elsewhere."""
        return self.criterion in ("taylor", "attribution") or ":" in self.criterion

    @field_validator("criterion")
    @classmethod
    def _known(cls, name: str) -> str:
        return CRITERIA.check(name)

    @model_validator(mode="after")
    def _removes_something(self) -> PruneConfig:
        if self.ratio == 0 and not any(self.ratios.values()):
            raise ValueError("ratio=0 removes nothing: ask for some, e.g. 0.3, or for layers in ratios")
        return self
