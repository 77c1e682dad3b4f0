"""Settings of attributions, and the methods by name. Importing them imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from workbench.config import Config, hint
from workbench.registry import Registry

METHODS = Registry("attribution method")
"""Functions from (model, x, target, config) to a tensor of x's shape, or one that broadcasts to it.

On the cards: whether a method needs the model's ``gradients``, whether it makes its ``own_draws`` (and is not smoothed by noise
from outside; it may take ``background`` samples as a fifth argument), its ``source``.
"""

for _name, _gradients, _source in (
    ("integrated_gradients", True, "Sundararajan et al. 2017, arXiv:1703.01365"),
    ("gradient_shap", True, "Lundberg & Lee 2017, arXiv:1705.07874; Erion et al. 2019, arXiv:1906.10670"),
    ("saliency", True, "Simonyan et al. 2013, arXiv:1312.6034"),
    ("input_x_gradient", True, "Shrikumar et al. 2016, arXiv:1605.01713"),
    ("gradcam", True, "Selvaraju et al. 2017, arXiv:1610.02391"),
    ("occlusion", False, "Zeiler & Fergus 2013, arXiv:1311.2901"),
    ("feature_ablation", False, "Zeiler & Fergus 2013, arXiv:1311.2901"),
):
    METHODS.register(
        _name,
        f"workbench.attribution.methods:{_name}",
        gradients=_gradients,
        own_draws=_name == "gradient_shap",
        source=_source,
    )


def card_of(method: str) -> Mapping[str, Any]:
    """What is known of a method; nothing, of one that is named by its import path."""
    return METHODS[method].card if method in METHODS else {}


class AttributionConfig(Config):
    """How an output is divided among the inputs."""

    kind: ClassVar[str] = "attribution"

    baseline: float = Field(0.0, description="Value of an absent input, after normalization; for token ids: the id of padding.")
    spread: float = Field(
        0.0,
        ge=0,
        description="Standard deviation, about baseline, of the Gaussian that baselines are drawn from (gradient_shap without "
        "background samples), in units of the input, or of the embedding of token ids.",
        json_schema_extra=hint(advanced=True),
    )
    steps: int = Field(32, ge=2, le=1000, description="Points on the path from baseline to input (integrated gradients, layers).")
    patches: int = Field(7, ge=1, le=64, description="Patches along each side of an image (occlusion).")
    window: int = Field(
        0,
        ge=0,
        le=1024,
        description="Occlusion by a sliding window: its side in pixels of an image, its length in steps of a sequence or tokens "
        "of a text; 0: the patches of an image, single steps or tokens.",
    )
    stride: int = Field(
        0,
        ge=0,
        le=1024,
        description="Pixels, steps or tokens by which the window moves on; 0: its own size. Where windows overlap, their credits "
        "are averaged.",
    )
    groups: tuple[tuple[int, ...], ...] = Field(
        (),
        description="Columns of a table that occlusion takes away together, such as those of one category; the others singly.",
        json_schema_extra=hint(advanced=True),
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of Gaussian noise on the input, in its units after normalization: credits are averaged "
        "over the draws (SmoothGrad, Smilkov et al. 2017). 0: none.",
    )
    draws: int = Field(32, ge=1, le=10_000, description="Random draws (gradient_shap, and whatever is smoothed by noise).")
    seed: int = Field(0, ge=0, lt=2**31, description="Of the draws, which are the same for every sample.")
    batch_size: int = Field(32, ge=1, description="Samples a call of the model, at most.", json_schema_extra=hint(advanced=True))
    layer: str = Field("", description="Layer whose activations are weighed (gradcam); by default the last convolution.")

    @model_validator(mode="after")
    def _windows_leave_no_gap(self) -> Self:
        if self.stride and not self.window:
            raise ValueError(f"stride={self.stride} moves a window, and there is none: set window to its size")
        if self.stride > self.window:
            raise ValueError(
                f"stride={self.stride} would leave gaps between windows of {self.window}: take at most {self.window}"
            )
        return self

    @model_validator(mode="after")
    def _columns_are_in_one_group(self) -> Self:
        columns = [column for group in self.groups for column in group]
        if len(columns) != len(set(columns)) or any(column < 0 for column in columns) or not all(self.groups):
            raise ValueError(f"groups={self.groups} must hold each column's number, from 0, at most once, and no empty group")
        return self
