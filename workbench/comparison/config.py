"""How variants are measured. Importing it imports no framework."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from workbench.attribution_config import METHODS
from workbench.config import Config, hint


def _rising(sizes: list[int]) -> list[int]:
    if sizes != sorted(set(sizes)):
        raise ValueError(f"batch_sizes={sizes} must rise: write {sorted(set(sizes))}")
    return sizes


BatchSize = Annotated[int, Field(ge=1, le=65536)]


class CompareConfig(Config):
    """How variants are measured."""

    kind: ClassVar[str] = "compare"

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to measure; auto: the GPU if every variant lies on it, else the CPU."
    )
    batch_sizes: Annotated[list[BatchSize], AfterValidator(_rising)] = Field(
        [1, 32],
        min_length=1,
        max_length=4,
        description="Samples a call, at which latency is measured; the last is also used for accuracy and peak memory.",
    )
    rounds: int = Field(
        40, ge=3, description="Calls timed for each variant and batch size, in turns.", json_schema_extra=hint(advanced=True)
    )
    seconds: float = Field(30.0, gt=0, description="Stop timing after so many seconds, once 3 rounds are done.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; by default as many as PyTorch uses now.", json_schema_extra=hint(advanced=True)
    )
    compile: bool = Field(True, description="Time compiled forms too, where there is a C++ compiler.")
    bf16: bool = Field(True, description="Time float variants compiled in bfloat16 as well: the simplest rival of INT8.")
    memory: bool = Field(True, description="Measure the peak memory of a call, by PyTorch's allocator.")
    reload: bool = Field(True, description="Save every variant, load it in a fresh process, and compare its outputs bit by bit.")
    attributions: int = Field(
        6, ge=0, le=256, description="Samples, drawn at random, on which to see whether attributions moved; 0: none."
    )
    attribution_method: Annotated[str, AfterValidator(METHODS.check)] = Field(
        "occlusion",
        description="How inputs are credited for the output: occlusion asks the measured forms themselves; methods by gradients "
        "ask the float models, and leave quantized ones out.",
        json_schema_extra=hint(choices="attributions", advanced=True),
    )
