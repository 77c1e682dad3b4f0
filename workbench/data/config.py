"""Which data to train on, in what batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from workbench.config import Arguments, Config, hint
from workbench.errors import unknown
from workbench.registry import ImportPath, Registry

AUGMENTATIONS = Registry(
    "augmentation",
    {
        name: f"workbench.data.augment:{name}"
        for name in ("crop", "reflect_crop", "flip", "shift", "cutout", "random_erasing", "color_jitter")
    }
    | {"trivial": "workbench.data.trivial:trivial"},
)
"""Augmentations of image batches, drawn per sample, on the device."""


class DataConfig(Config):
    """A data set by name, and how it is batched."""

    name: ImportPath = Field(
        "digits",
        description="A card in datasets/, or an import path to a function that returns splits, e.g. 'file.py:function'.",
        json_schema_extra=hint(choices="datasets"),
    )
    batch_size: int = Field(
        128,
        ge=1,
        description="Samples per optimizer step, over all ranks and accumulation micro-steps together.",
        json_schema_extra=hint(log=True),
    )
    eval_batch_size: int = Field(
        512, ge=1, description="Samples per evaluation batch, per rank.", json_schema_extra=hint(advanced=True)
    )
    augment: tuple[str, ...] | None = Field(
        None,
        description="Augmentations in order, e.g. crop, flip; empty for none; by default those the data set's card recommends.",
    )
    mix: Literal["off", "mixup", "cutmix"] = Field(
        "off",
        description="Train on mixed pairs of samples: mixup blends the two, cutmix pastes a box of one into the other.",
    )
    mix_alpha: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Pairs' shares are drawn from Beta(alpha, alpha): 1 for uniform, less for mostly one of the two.",
        json_schema_extra=hint(advanced=True),
    )
    placement: Literal["auto", "device", "loader"] = Field(
        "auto",
        description="Where samples wait: in the device's memory, augmented there in batch, or in a loader's worker processes.",
        json_schema_extra=hint(advanced=True),
    )
    workers: int = Field(
        2,
        ge=0,
        description="Loader processes per rank; unused when the data lies on the device.",
        json_schema_extra=hint(advanced=True),
    )
    holdout: float = Field(
        0.0,
        ge=0,
        description="Training samples held out and evaluated in place of the test samples, which no choice then sees: "
        "a share of them below 1, or their number; 0 to evaluate on the test samples. Stratified by class.",
        json_schema_extra=hint(advanced=True),
    )
    holdout_seed: int = Field(
        0, ge=0, lt=2**31, description="Of which samples are held out.", json_schema_extra=hint(advanced=True)
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Use only the first so many training samples, of those not held out.",
        json_schema_extra=hint(advanced=True),
    )
    resize: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Side, in pixels, of the square that images are scaled to when they are loaded, for models that want larger "
        "or smaller ones; by default they keep their size.",
        json_schema_extra=hint(advanced=True),
    )
    pad_to: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto",
        description="Multiple that the length of token sequences is filled up to; auto: 8 on a GPU in bf16, fp16 or fp8, where "
        "the model gives the same outputs; 1 for none.",
        json_schema_extra=hint(advanced=True),
    )
    args: Arguments = Field({}, description="Keyword arguments of the data set's loader.", json_schema_extra=hint(advanced=True))

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        from workbench.data.cards import card_names

        if ":" not in name and not name.endswith(".pkl") and name not in card_names():
            raise unknown("data set", name, card_names())
        return name

    @field_validator("augment")
    @classmethod
    def _augmentations_are_known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            AUGMENTATIONS.check(name)
        return names
