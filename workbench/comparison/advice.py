"""Warnings in words: a variant that is slower, bigger or worse than what it came from, and the likely reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from torch import nn

from workbench.comparison.forms import Form, Latencies, Score, Variant
from workbench.comparison.result import Measurement


def warnings_of(
    loaded: dict[str, Variant], forms: list[Form], scores: list[Score], latencies: list[Latencies], rows: list[Measurement]
) -> Iterator[str]:
    """A sentence wherever a variant is slower, bigger or worse than what it came from, with the likely reason."""
    names = list(loaded)
    deployed = {form.variant: index for index, form in enumerate(forms) if form.name != "compiled bf16"}  # the last: the fastest
    for name in names[1:]:
        variant, origin = loaded[name], _origin(name, loaded)
        now, then = deployed[name], deployed[origin]
        row, before = rows[now], rows[then]
        for which, batch in enumerate(("batch 1", "the larger batch")):
            new, old = median(latencies[now][which]), median(latencies[then][which])
            if new > 1.05 * old and _mostly_slower(latencies[now][which], latencies[then][which]):
                yield f"{name} is slower than {origin} at {batch}: {new:.2f} ms against {old:.2f} ms. {_why_slow(variant, row)}"
        if (size := variant.file_bytes) >= (before_size := loaded[origin].file_bytes):
            yield f"{name} is no smaller than {origin}: {size:,} bytes against {before_size:,}. {_why_big(variant)}"
        lost, won = _disagreements(scores[then].right, scores[now].right)
        if lost > won and (p := _sign_test(lost, won)) < 0.05:
            yield (
                f"{name} is worse than {origin}: {row.accuracy:.1%} of the samples against {before.accuracy:.1%} "
                f"({lost} lost, {won} won, p = {p:.2g}). {_why_worse(variant)}"
            )
        rival = next((r for r in rows if r.variant == origin and r.form == "compiled bf16"), None)
        if "quantize" in variant.kinds and rival is not None and rival.latency_p50_ms <= row.latency_p50_ms:
            yield (
                f"{origin} in bfloat16 takes {rival.latency_p50_ms:.2f} ms at batch 1, {name} {row.latency_p50_ms:.2f} ms: "
                "INT8 saves bytes here, not time."
            )


def _origin(name: str, loaded: dict[str, Variant]) -> str:
    """The variant that ``name`` was made from: the last whose history is the longest part of its own; else the first."""
    own, best, depth = loaded[name].structure, next(iter(loaded)), -1
    for other, variant in loaded.items():
        if other == name:
            break
        begun = variant.structure.transforms
        shorter = depth <= len(begun) < len(own.transforms)
        if shorter and variant.structure.model == own.model and begun == own.transforms[: len(begun)]:
            best, depth = other, len(begun)
    return best


def _mostly_slower(now: list[float], then: list[float]) -> bool:
    """Whether more rounds than chance would give were slower: one busy moment proves nothing."""
    slower = sum(a > b for a, b in zip(now, then, strict=True))
    return slower > len(now) / 2 and _sign_test(slower, len(now) - slower) < 0.05


def _why_slow(variant: Variant, row: Measurement) -> str:
    if row.form == "eager int8":
        return "It ran uncompiled, as a simulation: INT8 kernels need a C++ compiler."
    if "quantize" in variant.kinds and variant.structure.transforms[-1]["config"]["mode"] == "dynamic":
        return "Activation ranges are measured at each call; static quantization measures them once."
    if row.latency_p50_ms < 1:
        return "So small a model spends its time between layers, which fewer numbers don't shorten."
    if "quantize" in variant.kinds:
        return "Depthwise convolutions and conversions between layers gain little from INT8."
    odd = sum(m.out_channels % 8 > 0 for m in variant.model.modules() if isinstance(m, nn.Conv2d))
    return (
        f"{odd} of its convolutions have channels in no multiple of 8: prune with round_to=8."
        if odd
        else "The cause isn't known."
    )


def _why_big(variant: Variant) -> str:
    if "quantize" in variant.kinds:
        return "Few of its weights became INT8: dynamic mode leaves convolutions and embeddings alone."
    return "Nothing was removed from it."


def _why_worse(variant: Variant) -> str:
    if "quantize" in variant.kinds:
        return "Calibrate with more samples, typical of the data, or train with quantization."
    if "prune" in variant.kinds:
        return "Fine-tune after pruning, or remove less."
    return ""


def _disagreements(before: list[bool], after: list[bool]) -> tuple[int, int]:
    pairs = list(zip(before, after, strict=True))
    return sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)


def _sign_test(lost: int, won: int) -> float:
    """Two-sided exact probability of a split at least as uneven by chance (McNemar 1947)."""
    total = lost + won
    tail: float = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    return min(1.0, 2 * tail)
