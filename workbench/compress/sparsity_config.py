"""Settings of N:M sparsity. Importing them imports no framework."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from workbench.config import Config, hint


class SparsityConfig(Config):
    """How many weights stay of how many that lie side by side."""

    kind: ClassVar[str] = "sparsify"

    keep: int = Field(2, ge=1, le=16, description="Weights kept of each group of neighbours along the inputs.")
    of: int = Field(4, ge=2, le=32, description="Weights in a group; GPUs with sparse tensor cores run 2 of 4.")
    convolutions: bool = Field(
        True, description="Convolutions too, along their input channels; GPUs speed up linear layers only."
    )
    ignored: list[str] = Field(
        default_factory=list,
        description="Layers that stay dense, as names or patterns, e.g. 'head*'. Those whose inputs don't divide do too.",
        json_schema_extra=hint(advanced=True),
    )

    @model_validator(mode="after")
    def _some_go(self) -> SparsityConfig:
        if self.keep >= self.of:
            raise ValueError(f"keep={self.keep} of={self.of} removes nothing: keep fewer than there are")
        return self
