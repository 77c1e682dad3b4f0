"""Variants, and the forms in which each is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.artefact import load_model, read_structure, save_model, size_on_disk
from workbench.comparison.config import CompareConfig
from workbench.compress.compilation import compiled, has_compiler
from workbench.compress.cost import count_macs
from workbench.errors import DeviceError
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


@dataclass
class Score:
    """Counts of one form over the data; ``right`` by sample, for paired tests."""

    samples: int = 0
    agreeing: int = 0
    kl: float = 0.0
    right: list[bool] = field(default_factory=list)


def load(variant: Any, folder: Path) -> Variant:
    """A variant from a model, a run, or the folder of either; a model is saved in ``folder``, to see what it takes."""
    if isinstance(variant, nn.Module):
        model, saved = variant, save_model(variant, folder, weights_only=True)
        structure = structure_of(model)
    else:
        saved = Path(getattr(variant, "path", variant))
        model = load_model(saved)
        structure = structure_of(model)
    return Variant(model, structure, saved, read_structure(saved)["parameters"], size_on_disk(saved))


def device_for(loaded: Mapping[str, Variant], config: CompareConfig) -> torch.device:
    """Where to measure.

    Raises:
        DeviceError: CUDA is asked for, and not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device='cuda', and no CUDA device is there.", "Compare with device='cpu'.")
    on_gpu = all(_device(variant.model).type == "cuda" for variant in loaded.values())
    return torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and on_gpu) else "cpu")


def forms_of(loaded: Mapping[str, Variant], config: CompareConfig, device: torch.device) -> Iterator[Form]:
    """The forms to measure: quantized variants as deployed, float ones in every form that they could be deployed in."""
    compiling = config.compile and has_compiler()
    for name, variant in loaded.items():
        model = copy.deepcopy(variant.model).to(device).eval()
        number, quantized = variant.number, variant.quantized is not None
        if not (quantized and compiling):
            yield Form(name, f"eager {number}", "eager", _Plain(model), model)
        if compiling and device.type == "cpu":
            yield Form(name, f"compiled {number}", "compiled", compiled(model), model)
            if config.bf16 and not quantized:
                yield Form(name, BF16, "compiled", compiled(model, torch.bfloat16), model, rival=True)
        elif compiling:
            lower = config.bf16 and not quantized
            cast = copy.deepcopy(model).to(torch.bfloat16) if lower else model
            call = _Plain(torch.compile(cast, dynamic=False), _number_type(cast))  # GPUs are deployed in bf16, never in fp32
            yield Form(name, BF16 if lower else f"compiled {number}", "compiled", call, cast)


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
        counted = count_macs(variant.model, x[:1].to(_device(variant.model)))
        sees_all = variant.quantized is None or variant.quantized.get("mode") in ("static", "qat")
        variant.macs = counted if sees_all and counted else None


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind a model's parameters and buffers, each once."""
    storages: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for part in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, part))
        else:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            add(tensor.data)
    return sum(storages.values())


class _Plain:
    """A model as a function of one input, without gradients; floating-point inputs in the model's own numbers."""

    def __init__(self, model: Callable[[Tensor], Any], dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.model(x.to(self.dtype) if self.dtype is not None and x.is_floating_point() else x)
        return output


def _device(model: nn.Module) -> torch.device:
    tensors = (t for t in model.state_dict().values() if isinstance(t, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _number_type(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
