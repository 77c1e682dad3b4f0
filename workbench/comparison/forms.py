"""Variants, and the forms in which each is measured."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from workbench.artefact import load_model, read_structure, save_model, size_on_disk
from workbench.comparison.config import CompareConfig
from workbench.compress.compilation import compiled, has_compiler
from workbench.models.structure import Structure, structure_of

Latencies = tuple[list[float], list[float]]
"""Milliseconds of one form's calls, by round: at batch 1, and at the larger batch."""


@dataclass
class Variant:
    """A model, the record of how it came about, and what it takes."""

    model: nn.Module
    structure: Structure
    parameters: int
    file_bytes: int

    @property
    def kinds(self) -> list[str]:
        return [transform["kind"] for transform in self.structure.transforms]


@dataclass
class Form:
    """One way to run a variant; ``like`` groups the forms that are fairly compared with each other."""

    variant: str
    name: str
    like: str
    call: Callable[[torch.Tensor], torch.Tensor]


def load(variant: Any) -> Variant:
    model = variant if isinstance(variant, nn.Module) else load_model(getattr(variant, "path", variant))
    with tempfile.TemporaryDirectory() as folder:
        saved = save_model(model, folder, weights_only=True)
        parameters, file_bytes = read_structure(saved)["parameters"], size_on_disk(saved)
    return Variant(model, structure_of(model), parameters, file_bytes)


def forms_of(loaded: dict[str, Variant], config: CompareConfig) -> Iterator[Form]:
    """The forms to measure: quantized variants as deployed, float ones in every form that they could be deployed in."""
    compiling = config.compile and has_compiler()
    for name, variant in loaded.items():
        quantized = "quantize" in variant.kinds
        number = "int8" if quantized else "fp32"
        if not (quantized and compiling):
            yield Form(name, f"eager {number}", "eager", partial(_no_grad, copy.deepcopy(variant.model).cpu().eval()))
        if compiling:
            cpu = copy.deepcopy(variant.model).cpu()
            yield Form(name, f"compiled {number}", "compiled", compiled(cpu))
            if config.bf16 and not quantized:
                yield Form(name, "compiled bf16", "compiled", compiled(cpu, torch.bfloat16))


def _no_grad(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(x)
    return output


@dataclass
class Score:
    """Counts of one form over the data; ``right`` by sample, for paired tests."""

    samples: int = 0
    agreeing: int = 0
    kl: float = 0.0
    right: list[bool] = field(default_factory=list)
