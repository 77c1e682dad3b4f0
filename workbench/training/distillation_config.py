"""What a student learns from a teacher beside the data's own targets. Light: imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from workbench.config import Config, hint
from workbench.registry import Registry

DISTILLATIONS = Registry(
    "distillation term",
    {
        "soft": "workbench.training.distillation:SoftTargets",
        "features": "workbench.training.distillation:Features",
        "attention": "workbench.training.distillation:AttentionTransfer",
    },
)
"""Subclasses of :class:`workbench.training.distillation.Term`."""


class DistillConfig(Config):
    """Learning from a teacher. What is minimized is ``task`` times the loss plus each term times its weight."""

    teacher: str = Field("", description="The teacher: folder of a saved model or of a finished run. It is copied into the run.")
    terms: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {"soft": 0.9},
        description="What is compared, with its weight: soft (outputs softened by the temperature), features (outputs of layers; "
        "weights about 1), attention (where layers respond; weights about 5).",
        json_schema_extra=hint(choices="distillations"),
    )
    task: float = Field(0.1, ge=0, description="Weight of the ordinary loss, against the data's own targets.")
    temperature: float = Field(4.0, gt=0, le=100, description="By which logits are divided before they are compared.")
    layers: tuple[str, ...] = Field(
        (), description="Layers of the student that features and attention compare, by name or pattern, e.g. stages.*."
    )
    teacher_layers: tuple[str, ...] = Field(
        (),
        description="The teacher's layers that these are compared with, in the same order; by default those of the same names.",
        json_schema_extra=hint(advanced=True),
    )

    @field_validator("terms")
    @classmethod
    def _terms_are_known(cls, terms: dict[str, float]) -> dict[str, float]:
        for name in terms:
            DISTILLATIONS.check(name)
        return terms
