"""How copies of a model exchange their gradients. Light: imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from workbench.config import Config


class CommunicationConfig(Config):
    """What travels between the copies of a model after each optimizer step's backward pass, and in what pieces."""

    compress: Literal["off", "bf16", "powersgd"] = Field(
        "off",
        description="off: fp32, the exact mean; bf16: half the bytes, rounded to 8 bits; powersgd: low-rank factors, a "
        "hundredth of the bytes and less, what is left out being made good in later steps: for slow networks.",
    )
    rank: int = Field(
        4, ge=1, le=64, description="Rank of powersgd's factors: bytes grow in proportion, what is left out shrinks."
    )
    start: int = Field(
        100, ge=0, description="Optimizer steps that powersgd lets pass exactly: early gradients change too fast to follow."
    )
    bucket: Literal["auto", "whole"] | Annotated[float, Field(gt=0)] = Field(
        25.0,
        description="MiB of gradients that travel together, while the backward pass goes on; whole: all at once after it, with "
        "the fewest launches; auto: the fastest of several, timed on the run's own model and batch before the first step.",
    )
