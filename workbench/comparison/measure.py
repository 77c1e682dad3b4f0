"""Measuring variants: one pass over the data for accuracy, calls in turns for latency, a fresh process for reloading."""

from __future__ import annotations

import os
import platform
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.comparison.advice import flags_of
from workbench.comparison.config import CompareConfig
from workbench.comparison.forms import Form, Score, count_all_macs, device_for, device_of, first_calls, forms_of, load
from workbench.comparison.memory import peak_bytes
from workbench.comparison.moved import moved_attributions
from workbench.comparison.reload import Reload
from workbench.comparison.result import Comparison, Moved
from workbench.comparison.rows import class_changes, measurements
from workbench.compress.compilation import has_compiler
from workbench.compress.latency import latency_of
from workbench.compress.sample import try_out
from workbench.data.cards import card_names, read_card
from workbench.errors import ConfigError, DataError, ModelError
from workbench.run import Run


def compare(
    variants: Mapping[str, nn.Module | Run | str | os.PathLike[str]],
    data: Any,
    config: CompareConfig | None = None,
    *,
    class_names: Sequence[str] = (),
) -> Comparison:
    """Measure variants of a classifier on the same data, on this machine.

    Args:
        variants: name → a model, a run, or the folder of either; the first is what the others are compared with. None is changed.
        data: batches (x, y) of inputs (N, ...), floating-point or token ids, and class indices (N,).
        config: what to measure, and how long.
        class_names: in the order of the indices; by default those of the first run's data set.

    Returns:
        One row a variant and form: float variants eager and compiled, and in bfloat16; quantized ones compiled. With it, the
        classes that lost, the attributions that moved, and what got worse, in words.

    Raises:
        DataError: no data, batches that aren't (x, y), or inputs that a variant doesn't take.
        ModelError: a variant whose outputs aren't logits (N, classes).
        DeviceError: a device that isn't there.

    Intervals, 95 %: Wilson's of an accuracy, Tango's of the change on the same samples. "Worse" in the warnings: McNemar's exact
    test, p < 0.05; of classes, with Holm's correction.
    """
    config = CompareConfig.checked(config)
    if not isinstance(variants, Mapping) or not variants:
        raise ConfigError("There is nothing to compare.", 'Pass at least one variant by its name: {"baseline": model}.')
    batches = _batches(data)
    first = next(batches, None)
    if first is None:
        raise DataError("There is no data to compare on.", "Pass batches (x, y) of inputs and class indices.")
    names = list(class_names or getattr(data, "classes", ()) or _known_classes(variants.values()))
    with _threads(config.threads), tempfile.TemporaryDirectory() as folder:
        loaded = {str(name): load(v, Path(folder, f"variant-{i}")) for i, (name, v) in enumerate(variants.items())}
        device = device_for(loaded, config)
        for name, variant in loaded.items():
            try_out(variant.model, first[0][:1].to(device_of(variant.model)), "the data", f"The variant {name!r}")
        inputs = {size: _of_size(first[0], size).to(device) for size in config.batch_sizes}
        widest = inputs[config.batch_sizes[-1]]
        checked = loaded if config.reload else {}
        with closing(Reload(checked, first[0], Path(folder, "reload"))) as reload:
            made = forms_of(loaded, config, device)
            forms, memory, notes = first_calls(made, loaded, lambda form: _first_call(form, widest, config))
            seen = _scored(forms, _rebatched(first, batches, len(widest)), len(widest), config.attributions, device)
            reloaded = dict.fromkeys(loaded, "not checked") | reload.result()
        count_all_macs(loaded, first[0])
        latencies = _latencies(forms, inputs, config)
        moved: list[Moved] = []
        if config.attributions:
            x, y = (torch.stack(part) for part in zip(*seen.drawn.values(), strict=True))
            moved, unexplained = moved_attributions(loaded, forms, x.to(device), y, list(seen.drawn), config)
            notes += unexplained
        conditions = _conditions(device, config, len(seen.labels), len(latencies[0][0]))
    rows = measurements(loaded, forms, seen.scores, latencies, memory, reloaded, moved, config.batch_sizes)
    flags = flags_of(loaded, forms, seen.scores, latencies, rows)
    rows = [row.with_flags(flags) for row in rows]
    notes += _busy(conditions) + _uncompiled(config)
    return Comparison(
        measurements=rows,
        flags=flags,
        notes=notes,
        classes=class_changes(loaded, forms, seen.scores, seen.labels, names),
        moved=moved,
        class_names=names,
        conditions=conditions,
    )


# Data -------------------------------------------------------------------------------------------------------------------


def _batches(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if not isinstance(data, Iterable) or isinstance(data, Tensor):
        raise DataError(f"The data is a {type(data).__name__}.", "Pass batches (x, y) of inputs and class indices.")
    for batch in data:
        if not (isinstance(batch, tuple | list) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2])):
            raise DataError(f"A batch is a {type(batch).__name__}, not (x, y).", "Pass batches of input and class-index tensors.")
        x, y = batch[0].detach().cpu(), batch[1].detach().cpu()
        if y.is_floating_point() or y.shape != x.shape[:1]:
            raise DataError(f"Labels are {list(y.shape)} of {y.dtype}, for {len(x)} samples.", "Pass one class index a sample.")
        if len(x):
            yield x, y


def _rebatched(first: tuple[Tensor, Tensor], rest: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples in batches of ``size``, fewer at the end or where the shape changes."""
    x, y = first
    for more_x, more_y in rest:
        while len(x) >= size:
            yield x[:size], y[:size]
            x, y = x[size:], y[size:]
        if x.shape[1:] != more_x.shape[1:]:
            yield from [(x, y)] if len(x) else []
            x, y = more_x, more_y
        else:
            x, y = torch.cat([x, more_x]), torch.cat([y, more_y])
    yield from zip(x.split(size), y.split(size), strict=True)


def _of_size(x: Tensor, size: int) -> Tensor:
    """``size`` samples: the first ones, again and again where there are fewer."""
    return torch.cat([x] * -(-size // len(x)))[:size]


def _known_classes(variants: Iterable[Any]) -> Sequence[str]:
    for variant in variants:
        if isinstance(variant, Run) and (name := variant.config.data.name) in card_names():
            return read_card(name).classes
    return ()


# Scores -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What one pass over the data leaves: a score a form, the labels, and some samples drawn at random, by position."""

    scores: list[Score]
    labels: list[int] = field(default_factory=list)
    drawn: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def _scored(forms: list[Form], batches: Iterable[tuple[Tensor, Tensor]], size: int, draws: int, device: torch.device) -> _Seen:
    """One pass over the data; every batch is filled to ``size``, since each size is compiled anew."""
    seen, chance = _Seen([Score() for _ in forms]), random.Random(0)
    for x, y in batches:
        _draw(seen, x, y, draws, chance)
        filled = _of_size(x, size).to(device)
        reference: Tensor | None = None
        for form, score in zip(forms, seen.scores, strict=True):
            logits = _checked(form, form.call(filled), size)[: len(x)].double().log_softmax(1).cpu()
            reference = logits if reference is None else reference
            if logits.shape != reference.shape:
                raise ModelError(f"{form.variant!r} has {logits.shape[1]} classes, the first variant {reference.shape[1]}.")
            top = logits.argmax(1)
            score.samples += len(x)
            score.agreeing += int((top == reference.argmax(1)).sum())
            score.kl += float((reference.exp() * (reference - logits)).sum())
            score.right += (top == y).tolist()
        seen.labels += y.tolist()
    return seen


def _checked(form: Form, output: Any, size: int) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != size:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"The variant {form.variant!r} gives {found} for {size} samples.", "Compare classifiers: logits (N, classes)."
        )
    return output


def _draw(seen: _Seen, x: Tensor, y: Tensor, draws: int, chance: random.Random) -> None:
    """Keep ``draws`` samples so that in the end each was as likely to be kept (Vitter 1985, algorithm R); all of one shape."""
    if not draws or (seen.drawn and x.shape[1:] != next(iter(seen.drawn.values()))[0].shape):
        return
    for index in range(len(x)):
        position = len(seen.labels) + index
        if len(seen.drawn) == draws:
            place = chance.randrange(position + 1)
            if place >= draws:
                continue
            del seen.drawn[list(seen.drawn)[place]]
        seen.drawn[position] = x[index], y[index]


def _first_call(form: Form, x: Tensor, config: CompareConfig) -> int | None:
    """The form's peak memory, if it is wanted and can be seen."""
    if config.memory and not form.foreign:
        return peak_bytes(form, x)
    form.call(x)
    return None


# Time -------------------------------------------------------------------------------------------------------------------


def _latencies(forms: list[Form], inputs: Mapping[int, Tensor], config: CompareConfig) -> list[list[list[float]]]:
    """Milliseconds by form, batch size and round, everything taking turns."""
    calls: dict[str, Callable[[], Any]] = {
        f"{index}/{size}": partial(form.call, x) for index, form in enumerate(forms) for size, x in inputs.items()
    }
    taken = latency_of(calls, config.rounds, config.seconds)
    return [[taken[f"{index}/{size}"] for size in inputs] for index in range(len(forms))]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


# Conditions -------------------------------------------------------------------------------------------------------------


def _conditions(device: torch.device, config: CompareConfig, samples: int, rounds: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "batch_sizes": list(config.batch_sizes),
        "samples": samples,
        "rounds": rounds,
        "attribution_method": config.attribution_method,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "torch": torch.__version__,
    }


def _busy(conditions: Mapping[str, Any]) -> list[str]:
    if conditions["load"] <= 1.5 * (os.cpu_count() or 1):
        return []
    return [
        f"Others kept this machine busy (load {conditions['load']:.1f} on {os.cpu_count()} cores): "
        "ratios hold better than milliseconds; measure again when it is quiet."
    ]


def _uncompiled(config: CompareConfig) -> list[str]:
    if not config.compile or has_compiler():
        return []
    return ["Nothing was compiled, and INT8 was simulated: no C++ compiler was found. Install g++, or set CXX."]


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
