"""How variants are measured."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from workbench.config import Config


class CompareConfig(Config):
    """How variants are measured."""

    kind: ClassVar[str] = "compare"

    rounds: int = Field(40, ge=3, description="Calls timed for each variant and batch size, in turns.")
    seconds: float = Field(30.0, gt=0, description="Stop timing after so many seconds, once 3 rounds are done.")
    threads: int | None = Field(None, ge=1, description="CPU threads; by default as many as PyTorch uses now.")
    compile: bool = Field(True, description="Time compiled forms too, where there is a C++ compiler.")
    bf16: bool = Field(True, description="Time float variants compiled in bfloat16 as well: the simplest rival of INT8.")
