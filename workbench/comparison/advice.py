"""Flags: a variant that is slower, bigger or worse than what it came from, and the likely reason in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from workbench.comparison.forms import BF16, Form, Score, Variant, deployed_forms, origins
from workbench.comparison.intervals import sign_test
from workbench.comparison.reload import EQUAL
from workbench.comparison.result import Flag, Measurement
from workbench.comparison.rows import Times, costs, disagreements


def flags_of(
    loaded: Mapping[str, Variant], forms: list[Form], scores: list[Score], latencies: list[Times], rows: list[Measurement]
) -> list[Flag]:
    """A flag wherever a variant is slower, bigger or worse than what it came from, at the row by which it is judged."""
    deployed = deployed_forms(forms)
    found = [Flag(rows[i].variant, rows[i].form, "reload", words) for i in deployed.values() if (words := _reload(rows[i]))]
    for name, origin in origins(loaded).items():
        now, then = deployed[name], deployed[origin]
        row, before, variant = rows[now], rows[then], loaded[name]
        said = [
            *_slower(variant, row, before, latencies[now], latencies[then], origin),
            *_bigger(variant, row, before, origin),
            *_worse(variant, row, before, scores[now], scores[then], origin),
            *_no_faster_than_bf16(variant, row, rows, origin),
            *_dominated(row, rows),
        ]
        found += [Flag(name, row.form, what, words) for what, words in said]
    return found


Said = Iterator[tuple[str, str]]
"""(which figure, the sentence)."""


def _slower(variant: Variant, row: Measurement, before: Measurement, now: Times, then: Times, origin: str) -> Said:
    for index, (new, old) in enumerate(zip(row.latencies, before.latencies, strict=True)):
        if new.p50_ms > 1.05 * old.p50_ms and _mostly_slower(now[index], then[index]):
            yield (
                f"batch{new.batch}" if index else "latency",
                f"{row.variant} is slower than {origin} at batch {new.batch}: {new.p50_ms:.2f} ms against {old.p50_ms:.2f} ms. "
                f"{_why_slow(variant, row)}",
            )


def _bigger(variant: Variant, row: Measurement, before: Measurement, origin: str) -> Said:
    if row.file_bytes >= before.file_bytes:
        why = "Few of its weights became integers." if variant.quantized else "Nothing was removed from it."
        if variant.quantized and variant.quantized["mode"] == "dynamic":
            why = "Few of its weights became INT8: dynamic mode leaves convolutions and embeddings alone."
        yield (
            "file",
            f"{row.variant} is no smaller than {origin}: {row.file_bytes:,} bytes against {before.file_bytes:,}. {why}",
        )
    new, old = row.memory_bytes, before.memory_bytes
    if new is not None and old is not None and new > 1.05 * old:
        why = "Activations and buffers fill the memory, not weights."
        if row.form.startswith("eager") and variant.quantized:
            why = "It ran uncompiled, as a simulation in floating point."
        elif variant.quantized:
            why = "Between INT8 layers, values are kept in floating point as well."
        yield (
            "memory",
            f"{row.variant} needs more memory than {origin}: {new / 1e6:.1f} MB against {old / 1e6:.1f} MB at batch "
            f"{row.latencies[-1].batch}. {why}",
        )


def _worse(variant: Variant, row: Measurement, before: Measurement, now: Score, then: Score, origin: str) -> Said:
    lost, won = disagreements(then.right, now.right)
    if lost > won and (p := sign_test(lost, won)) < 0.05:
        yield (
            "accuracy",
            f"{row.variant} is worse than {origin}: {row.accuracy:.1%} of the samples against {before.accuracy:.1%} "
            f"({lost} lost, {won} won, p = {p:.2g}). {_why_worse(variant)}".strip(),
        )


def _no_faster_than_bf16(variant: Variant, row: Measurement, rows: list[Measurement], origin: str) -> Said:
    rival = next((r for r in rows if r.variant == origin and r.form == BF16), None)
    if variant.quantized is not None and rival is not None and rival.latency_p50_ms <= row.latency_p50_ms:
        kind = variant.number.upper()
        yield (
            "bf16",
            f"{origin} in bfloat16 takes {rival.latency_p50_ms:.2f} ms at batch {row.latencies[0].batch}, {row.variant} "
            f"{row.latency_p50_ms:.2f} ms: {kind} saves bytes here, not time.",
        )


def _dominated(row: Measurement, rows: list[Measurement]) -> Said:
    """Whether nothing speaks for a variant: none of its rows is on the frontier, and one other beats its deployed one."""
    if any(r.frontier for r in rows if r.variant == row.variant):
        return
    own = costs(row)
    for other in rows:
        if other.variant != row.variant and other.frontier and all(a <= b for a, b in zip(costs(other), own, strict=True)):
            yield (
                "frontier",
                f"Nothing measured here speaks for {row.variant}: {other.variant} ({other.form}) is at least as accurate, as "
                f"fast at batch {row.latencies[0].batch} and as small.",
            )
            return


def _reload(row: Measurement) -> str:
    if row.reload == EQUAL or row.reload.startswith(("not checked", "weights only")):
        return ""
    why = (
        "Save it with this version of the workbench, and look at what its code reads from outside."
        if row.reload.startswith("fails")
        else "Its outputs depend on more than what was saved: a random number, a buffer outside state_dict, or another kernel."
    )
    return f"{row.variant} doesn't come back from disk as it was: {row.reload}. {why}"


def _mostly_slower(now: list[float], then: list[float]) -> bool:
    """Whether more rounds than chance would give were slower: one busy moment proves nothing."""
    slower = sum(a > b for a, b in zip(now, then, strict=True))
    return slower > len(now) / 2 and sign_test(slower, len(now) - slower) < 0.05


def _why_slow(variant: Variant, row: Measurement) -> str:
    settings = variant.quantized
    if settings is not None and row.form.startswith("eager"):
        return "It ran uncompiled, as a simulation: INT8 kernels need a C++ compiler."
    if settings is not None and settings["mode"] == "dynamic":
        return "Activation ranges are measured at each call; static quantization measures them once."
    if settings is not None and settings["mode"] == "weight_only":
        return (
            "Its weights are turned back into floating point at each call: this saves bytes, and time only where memory is slow."
        )
    if row.latency_p50_ms < 1:
        return "So small a model spends its time between layers, which fewer numbers don't shorten."
    if settings is not None:
        return "Depthwise convolutions and conversions between layers gain little from INT8."
    odd = sum(m.out_channels % 8 > 0 for m in variant.model.modules() if isinstance(m, nn.Conv2d))
    return (
        f"{odd} of its convolutions have channels in no multiple of 8: prune with round_to=8."
        if odd
        else "The cause isn't known."
    )


def _why_worse(variant: Variant) -> str:
    if variant.quantized is not None:
        return "Calibrate with more samples, typical of the data, keep sensitive layers in bf16, or train with quantization."
    if "prune" in variant.kinds:
        return "Fine-tune after pruning, or remove less."
    return ""
