"""Variants, and the forms in which each is measured."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.artefact import load_model, read_structure, save_model, size_on_disk
from workbench.comparison.config import CompareConfig
from workbench.compress.compilation import compiled, first_line, has_compiler
from workbench.compress.cost import count_macs
from workbench.compress.gpu import ReducedModel
from workbench.errors import ConfigError, DeviceError
from workbench.models.structure import Structure, structure_of

BF16 = "compiled bf16"


@dataclass
class Variant:
    """A model, the record of how it came about, where it is saved, and what it takes."""

    model: nn.Module
    structure: Structure
    folder: Path
    parameters: int
    file_bytes: int
    macs: int | None = None
    """Multiply-accumulates of one sample; None where they can't be counted."""

    @property
    def kinds(self) -> list[str]:
        return [transform["kind"] for transform in self.structure.transforms]

    @property
    def quantized(self) -> dict[str, Any] | None:
        """The settings by which it was quantized."""
        return next((dict(t["config"]) for t in reversed(self.structure.transforms) if t["kind"] == "quantize"), None)

    @property
    def number(self) -> str:
        """The format of its numbers, in a word."""
        settings = self.quantized
        if settings is None:
            return "fp32"
        return "fp8" if settings.get("mode") == "fp8" else f"int{settings.get('weight_bit', 8)}"

    @property
    def backend(self) -> str:
        """What it was quantized for; "" for a float model, which runs anywhere."""
        return str((self.quantized or {}).get("backend", "cpu")) if self.quantized is not None else ""


@dataclass
class Form:
    """One way to run a variant; ``like`` groups the forms that are fairly compared with each other."""

    variant: str
    name: str
    like: str
    call: Callable[[Tensor], Tensor]
    model: nn.Module
    """What it holds in memory, beside what compiling adds."""
    rival: bool = False
    """Measured for comparison only: bfloat16 on a CPU, which any float model could have."""
    foreign: bool = False
    """Run by another runtime than PyTorch, whose memory PyTorch doesn't see."""


@dataclass
class Score:
    """Counts of one form over the data; ``right`` by sample, for paired tests."""

    samples: int = 0
    agreeing: int = 0
    kl: float = 0.0
    right: list[bool] = field(default_factory=list)


def load(variant: Any, folder: Path) -> Variant:
    """A variant from a model, a run, or the folder of either; a model is saved in ``folder``, to see what it takes.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(variant, nn.Module):
        model, saved = variant, save_model(variant, folder, weights_only=True)
    else:
        place = getattr(variant, "path", variant)
        if not isinstance(place, str | os.PathLike):
            raise ConfigError(f"A variant is a {type(variant).__name__}.", "Pass a model, a run, or the folder of either.")
        saved = Path(place)
        steps = read_structure(saved)["transforms"]
        on_gpu = any(step["kind"] == "quantize" and step.get("config", {}).get("backend") == "cuda" for step in steps)
        model = load_model(saved, "cuda" if on_gpu else "cpu")
    return Variant(model, structure_of(model), saved, read_structure(saved)["parameters"], size_on_disk(saved))


def device_for(loaded: Mapping[str, Variant], config: CompareConfig) -> torch.device:
    """Where to measure.

    Raises:
        DeviceError: CUDA is asked for, and not there.
        ConfigError: a variant was quantized for another device.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device='cuda', and no CUDA device is there.", "Compare with device='cpu'.")
    there = [device_of(variant.model).type == "cuda" for variant in loaded.values()]
    for_gpu = [name for name, variant in loaded.items() if variant.backend == "cuda"]
    chosen = config.device if config.device != "auto" else "cuda" if for_gpu or all(there) else "cpu"
    for name, variant in loaded.items():
        if variant.backend and (variant.backend == "cuda") != (chosen == "cuda"):
            made_for = "GPUs" if variant.backend == "cuda" else "CPUs"
            raise ConfigError(
                f"{name!r} was quantized for {made_for} (backend={variant.backend!r}), and this measures on {chosen}.",
                "Compare variants for one device at a time.",
            )
    return torch.device(chosen)


def forms_of(loaded: Mapping[str, Variant], config: CompareConfig, device: torch.device) -> Iterator[Form]:
    """The forms to measure: quantized variants as deployed, float ones in every form that they could be deployed in.

    On GPUs, deployed means compiled in bfloat16.
    """
    compiling = config.compile and has_compiler()
    for name, variant in loaded.items():
        if variant.backend not in ("", "cpu", "cuda"):
            own = f"{variant.backend} {variant.number}"
            yield Form(name, own, "compiled", _Plain(variant.model), variant.model, foreign=True)
            continue
        model = copy.deepcopy(variant.model).to(device).eval()
        if not (variant.backend and compiling):
            yield _eager(name, variant.number, model)
        if compiling and device.type == "cuda" and not variant.backend and config.bf16:
            reduced = ReducedModel(copy.deepcopy(model))
            yield Form(name, BF16, "compiled", compiled(reduced), reduced)
        elif compiling:
            yield Form(name, f"compiled {variant.number}", "compiled", compiled(model), model)
            if config.bf16 and not variant.backend:
                yield Form(name, BF16, "compiled", compiled(model, torch.bfloat16), model, rival=True)


def first_calls(
    forms: Iterable[Form], loaded: Mapping[str, Variant], call: Callable[[Form], int | None]
) -> tuple[list[Form], list[int | None], list[str]]:
    """Call every form once, which compiles it: (forms that run, what the calls gave, notes on those that don't compile).

    A form that can't be compiled is left out, or run as it is if the variant has no other.
    """
    usable: list[Form] = []
    given: list[int | None] = []
    notes: dict[str, str] = {}
    for form in forms:
        try:
            result = call(form)
        except Exception as error:  # a compiler fails in many ways, and the variant can be judged without it
            if not form.name.startswith("compiled"):
                raise
            notes.setdefault(form.variant, f"{form.variant} isn't compiled: {first_line(error)}")
            if any(other.variant == form.variant for other in usable):
                continue
            form = _eager(form.variant, loaded[form.variant].number, form.model)
            result = call(form)
        usable.append(form)
        given.append(result)
    return usable, given, list(notes.values())


def _eager(variant: str, number: str, model: nn.Module) -> Form:
    return Form(variant, f"eager {number}", "eager", _Plain(model), model)


def origins(loaded: Mapping[str, Variant]) -> dict[str, str]:
    """What each variant but the first was made from: the last whose history is the longest part of its own; else the first."""
    names = list(loaded)
    found = {}
    for index, name in enumerate(names[1:], start=1):
        own, best, depth = loaded[name].structure, names[0], -1
        for other in names[:index]:
            begun = loaded[other].structure.transforms
            shorter = depth <= len(begun) < len(own.transforms)
            if shorter and loaded[other].structure.model == own.model and begun == own.transforms[: len(begun)]:
                best, depth = other, len(begun)
        found[name] = best
    return found


def references(forms: list[Form], loaded: Mapping[str, Variant]) -> list[int | None]:
    """What each form is paired with: the like form of its variant's origin; a lower precision, its own variant's other form."""
    made_from = origins(loaded)
    found: list[int | None] = []
    for form in forms:
        beside = form.rival or (form.name == BF16 and form.variant not in made_from)
        paired = form.variant if beside else made_from.get(form.variant)
        others = [i for i, f in enumerate(forms) if f.variant == paired and not f.rival and (f.name != BF16 or not beside)]
        alike = [i for i in others if forms[i].like == form.like]
        found.append((alike or others)[-1] if others else None)
    return found


def deployed_forms(forms: list[Form]) -> dict[str, int]:
    """The index of the form by which a variant is judged: the last that is no rival, which is the fastest."""
    return {form.variant: index for index, form in enumerate(forms) if not form.rival}


def count_all_macs(loaded: Mapping[str, Variant], x: Tensor) -> None:
    """Fill in the multiply-accumulates of one sample of ``x`` (N, ...).

    Quantizing changes none, and the counter doesn't see all INT8 kernels: a quantized variant has those of what it came from.
    """
    made_from = origins(loaded)
    for name, variant in loaded.items():
        if variant.quantized is not None and (origin := made_from.get(name)) and loaded[origin].quantized is None:
            steps = variant.kinds[len(loaded[origin].kinds) :]
            if loaded[origin].parameters == variant.parameters and set(steps) <= {"quantize", "qat"}:
                variant.macs = loaded[origin].macs
                continue
        counted = count_macs(variant.model, x[:1].to(device_of(variant.model)))
        sees_all = variant.quantized is None or (variant.backend != "cuda" and variant.quantized.get("mode") in ("static", "qat"))
        variant.macs = counted if sees_all and counted else None


class _Plain:
    """A model as a function of one input, without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.model(x)
        return output


def device_of(model: nn.Module) -> torch.device:
    """Where its tensors lie."""
    tensors = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
