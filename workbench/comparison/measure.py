"""Measuring variants: one pass over the data for accuracy, calls in turns for latency."""

from __future__ import annotations

import itertools
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from workbench.comparison.advice import warnings_of
from workbench.comparison.config import CompareConfig
from workbench.comparison.forms import Form, Latencies, Score, Variant, forms_of, load
from workbench.comparison.result import Comparison, Measurement
from workbench.errors import ConfigError, DataError, ModelError
from workbench.run import Run


def compare(
    variants: Mapping[str, nn.Module | Run | str | os.PathLike[str]], data: Any, config: CompareConfig | None = None
) -> Comparison:
    """Measure variants of a classifier on the same data, on this machine's CPU.

    Args:
        variants: name → a model, a run, or the folder of either; the first is what the others are compared with. None is changed.
        data: batches (x, y) of inputs (N, ...) and class indices (N,). The first batch's size is the larger one timed.

    Returns:
        One row a variant and form: float variants eager and compiled, and in bfloat16; quantized ones compiled.

    Raises:
        DataError: no data, or batches that aren't (x, y).
        ModelError: a variant whose outputs aren't logits (N, classes).

    Intervals: Wilson, 95 %. "Worse" in the warnings: McNemar's exact test on the same samples, p < 0.05.
    """
    config = config or CompareConfig()
    if not variants:
        raise ConfigError("There is nothing to compare.", 'Pass at least one variant: {"baseline": model}.')
    loaded = {str(name): load(variant) for name, variant in variants.items()}
    batches = _batches(data)
    first = next(batches, None)
    if first is None:
        raise DataError("There is no data to compare on.", "Pass batches (x, y) of inputs and class indices.")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        forms = list(forms_of(loaded, config))
        scores = _scores(forms, first, batches)
        latencies = _latencies(forms, first[0], config)
        conditions: dict[str, Any] = {
            "cpu": _cpu(),
            "threads": torch.get_num_threads(),
            "batch": len(first[0]),
            "samples": scores[0].samples,
            "rounds": len(latencies[0][1]),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
            "torch": torch.__version__,
        }
    finally:
        torch.set_num_threads(threads)
    measurements = _measurements(loaded, forms, scores, latencies)
    warnings = list(warnings_of(loaded, forms, scores, latencies, measurements))
    if conditions["load"] > 1.5 * (os.cpu_count() or 1):
        warnings.append(
            f"Others kept this machine busy (load {conditions['load']:.1f} on {os.cpu_count()} cores): "
            "ratios hold better than milliseconds; measure again when it is quiet."
        )
    return Comparison(measurements, warnings, conditions)


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, by default 95 % (Wilson 1927)."""
    center = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


# Scores -----------------------------------------------------------------------------------------------------------------


def _batches(data: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if not isinstance(data, Iterable) or isinstance(data, torch.Tensor):
        raise DataError(f"The data is a {type(data).__name__}.", "Pass batches (x, y) of inputs and class indices.")
    for batch in data:
        if not (
            isinstance(batch, tuple | list) and len(batch) >= 2 and all(isinstance(part, torch.Tensor) for part in batch[:2])
        ):
            raise DataError(f"A batch is a {type(batch).__name__}, not (x, y).", "Pass batches of input and class-index tensors.")
        x, y = batch[0].detach().cpu(), batch[1].detach().cpu()
        if y.is_floating_point() or y.shape != x.shape[:1]:
            raise DataError(f"Labels are {list(y.shape)} of {y.dtype}, for {len(x)} samples.", "Pass one class index a sample.")
        if len(x):
            yield x, y


def _scores(
    forms: list[Form], first: tuple[torch.Tensor, torch.Tensor], rest: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> list[Score]:
    """One pass over the data; every batch is cut or filled to the first one's size, since each size is compiled anew."""
    size = len(first[0])
    scores = [Score() for _ in forms]
    for whole_x, whole_y in itertools.chain([first], rest):
        for x, y in zip(torch.split(whole_x, size), torch.split(whole_y, size), strict=True):
            filled = torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])]) if len(x) < size else x
            reference: torch.Tensor | None = None
            for form, score in zip(forms, scores, strict=True):
                output = form.call(filled)
                if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != size:
                    found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                    raise ModelError(
                        f"The variant {form.variant!r} gives {found} for {size} samples.",
                        "Compare classifiers: logits (N, classes).",
                    )
                logits = output[: len(x)].double().log_softmax(1)
                reference = logits if reference is None else reference
                if logits.shape != reference.shape:
                    raise ModelError(f"{form.variant!r} has {logits.shape[1]} classes, the first variant {reference.shape[1]}.")
                top = logits.argmax(1)
                score.samples += len(x)
                score.agreeing += int((top == reference.argmax(1)).sum())
                score.kl += float((reference.exp() * (reference - logits)).sum())
                score.right += (top == y).tolist()
    return scores


# Time -------------------------------------------------------------------------------------------------------------------


def _latencies(forms: list[Form], x: torch.Tensor, config: CompareConfig) -> list[Latencies]:
    """Milliseconds of each form's calls at batch 1 and at the whole batch, the forms taking turns."""
    inputs = (x[:1].clone(), x)
    for form in forms:
        for sample in inputs:
            for _ in range(3):  # compile, then settle
                form.call(sample)
    taken: list[Latencies] = [([], []) for _ in forms]
    end = time.perf_counter() + config.seconds
    for done in range(config.rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for form, times in zip(forms, taken, strict=True):
            for sample, out in zip(inputs, times, strict=True):
                start = time.perf_counter_ns()
                form.call(sample)
                out.append((time.perf_counter_ns() - start) / 1e6)
    return taken


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (position - low)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Results ---------------------------------------------------------------------------------------------------------------


def _measurements(
    loaded: dict[str, Variant], forms: list[Form], scores: list[Score], latencies: list[Latencies]
) -> list[Measurement]:
    baseline = next(iter(loaded.values()))
    medians = [(_percentile(one, 50), _percentile(many, 50)) for one, many in latencies]
    like = {form.like: median for form, median in zip(reversed(forms), reversed(medians), strict=True)}  # the first of its like
    found = []
    for form, score, (one, many), median in zip(forms, scores, latencies, medians, strict=True):
        variant, right = loaded[form.variant], sum(score.right)
        low, high = wilson(right, score.samples)
        found.append(
            Measurement(
                variant=form.variant,
                form=form.name,
                accuracy=right / score.samples,
                accuracy_low=low,
                accuracy_high=high,
                parameters=variant.parameters,
                file_bytes=variant.file_bytes,
                latency_p50_ms=median[0],
                latency_p95_ms=_percentile(one, 95),
                batch_p50_ms=median[1],
                batch_p95_ms=_percentile(many, 95),
                agreement=score.agreeing / score.samples,
                kl=max(0.0, score.kl / score.samples),
                size_ratio=baseline.file_bytes / variant.file_bytes,
                speed_ratio=like[form.like][0] / median[0],
                batch_speed_ratio=like[form.like][1] / median[1],
            )
        )
    return found
