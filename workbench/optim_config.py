"""How parameters are updated: optimizer, schedule, clipping. Light: imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from workbench.config import Arguments, Config, hint
from workbench.registry import ImportPath, Registry

OPTIMIZERS = Registry(
    "optimizer",
    {
        "sgd": "torch.optim:SGD",
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        "nadam": "torch.optim:NAdam",
        "radam": "torch.optim:RAdam",
        "rmsprop": "torch.optim:RMSprop",
        "adagrad": "torch.optim:Adagrad",
        "dynamic_graph": "workbench.optim:DynamicGraphOptimizer",
    },
)
"""Factories of optimizers: called with parameter groups and keyword arguments."""


class OptimConfig(Config):
    """The optimizer."""

    name: ImportPath = Field(
        "adamw", description="A registered optimizer or an import path.", json_schema_extra=hint(choices="optimizers")
    )
    lr: float = Field(1e-3, gt=0, le=100, description="Peak learning rate, per optimizer step.", json_schema_extra=hint(log=True))
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="Weight decay of matrices and kernels, as the optimizer defines it.",
        json_schema_extra=hint(log=True),
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum (Nesterov's) of sgd and rmsprop.")
    decay_vectors: bool = Field(
        False, description="Also decay biases and normalization parameters.", json_schema_extra=hint(advanced=True)
    )
    args: Arguments = Field({}, description="Further keyword arguments of the optimizer.", json_schema_extra=hint(advanced=True))

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        return OPTIMIZERS.check(name)


class ScheduleConfig(Config):
    """The learning rate over the run, as a multiple of the peak."""

    name: Literal["constant", "cosine", "linear", "step"] = Field("cosine", description="Shape after the warm-up.")
    warmup: float = Field(0.05, ge=0, le=1, description="Linear warm-up, as a share of all optimizer steps.")
    final: float = Field(0.0, ge=0, le=1, description="Rate at the end of cosine or linear, as a share of the peak.")
    milestones: tuple[float, ...] = Field(
        (0.5, 0.75),
        description="For step: shares of the run at which the rate falls tenfold.",
        json_schema_extra=hint(advanced=True),
    )


class ClipConfig(Config):
    """Gradient clipping."""

    mode: Literal["off", "fixed", "dynamic", "agc"] = Field(
        "off", description="off; fixed norm; dynamic: follows the running norm below it; agc: by unit, relative to the weights."
    )
    max_norm: float = Field(
        1.0, gt=0, description="Largest gradient norm (agc: ratio of gradient to weight norm).", json_schema_extra=hint(log=True)
    )
