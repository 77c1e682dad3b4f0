"""Settings of attributions, and the methods by name. Importing them imports no framework."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from workbench.config import Config, hint
from workbench.registry import Registry

METHODS = Registry(
    "attribution method",
    {
        name: f"workbench.attribution:{name}"
        for name in ("integrated_gradients", "saliency", "input_x_gradient", "gradcam", "occlusion", "feature_ablation")
    },
)
"""Functions from (model, x, target, config) to a tensor of x's shape, or one that broadcasts to it."""


class AttributionConfig(Config):
    """How an output is divided among the inputs."""

    kind: ClassVar[str] = "attribution"

    baseline: float = Field(0.0, description="Value of an absent input, after normalization; for token ids: the id of padding.")
    steps: int = Field(32, ge=2, le=1000, description="Points on the path from baseline to input (integrated gradients).")
    patches: int = Field(7, ge=1, le=64, description="Patches along each side of an image (occlusion).")
    batch_size: int = Field(32, ge=1, description="Samples a call of the model, at most.", json_schema_extra=hint(advanced=True))
    layer: str = Field("", description="Layer whose activations are weighed (gradcam); by default the last convolution.")
