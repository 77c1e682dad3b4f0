"""How a comparison looks: as text, as a fragment for a notebook or panel, and as a page that needs nothing else.

What decides is in the template ``comparison.html.j2``; here are the words and numbers of its cells. Names come from outside: the
template escapes everything that isn't drawn by :mod:`~workbench.comparison.drawing` or made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from workbench.attribution.pictures import heat
from workbench.comparison.drawing import small_multiples, variant_colours
from workbench.comparison.reload import EQUAL
from workbench.comparison.result import ClassChange, Comparison, Measurement, Moved

CLASSES = 5
"""Classes shown for a variant: those that lost most."""
SAMPLES = 4
"""Samples shown for a variant: those whose attributions moved most."""


@dataclass(frozen=True)
class Cell:
    """A figure, with a smaller line beneath; ``flag`` is why it is marked as worse."""

    text: str
    small: str = ""
    flag: str = ""


def page(comparison: Comparison) -> str:
    """One HTML file: no script, no request, light or dark as the reader's system is."""
    return _render(comparison, "page")


def fragment(comparison: Comparison) -> str:
    """The same within a notebook's output or a panel, in JupyterLab's colours."""
    return _render(comparison, "fragment")


def text(comparison: Comparison) -> str:
    """The table in aligned columns, the conditions, the warnings."""
    table = [_text_headings(comparison), *(_text_row(m) for m in comparison.measurements)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]
    lines.insert(1, "─" * max(map(len, lines)))
    return "\n".join([*lines, conditions(comparison), *(f"! {warning}" for warning in comparison.warnings)])


def conditions(comparison: Comparison) -> str:
    """Under what conditions the figures were taken, and what they are relative to."""
    c = {
        "device": "CPU",
        "samples": 0,
        "threads": "?",
        "torch": "?",
        "rounds": "?",
        "batch_sizes": ["?"],
        **comparison.conditions,
    }
    return (
        f"{c['samples']:,} samples; {c['device']}, {c['threads']} thread(s), PyTorch {c['torch']}; medians of {c['rounds']} "
        f"calls, taken in turns; memory at batch {c['batch_sizes'][-1]}. Change is in points against what a variant came from, "
        "on the same samples; size and speed are against the first variant, in the like form. Intervals: 95 %; *: frontier."
    )


def _render(comparison: Comparison, block: str) -> str:
    from markupsafe import Markup

    names = comparison.class_names
    return _template().render(
        whole=block == "page",
        sizes=[latency.batch for latency in comparison.measurements[0].latencies],
        groups=list(_groups(comparison)),
        charts=[(title, Markup(svg)) for title, svg in small_multiples(comparison.measurements)],
        colours=variant_colours(comparison.measurements),
        flags=comparison.flags,
        notes=comparison.notes,
        conditions=conditions(comparison),
        method=str(comparison.conditions.get("attribution_method", "")).replace("_", " "),
        classes=list(_classes(comparison)),
        moved=list(_moved(comparison, names)),
    )


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("workbench.comparison", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("comparison.html.j2")


# The table --------------------------------------------------------------------------------------------------------------


def _groups(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """By variant: what all its forms share, then the forms."""
    by_variant: dict[str, list[Measurement]] = {}
    for row in comparison.measurements:
        by_variant.setdefault(row.variant, []).append(row)
    for variant, rows in by_variant.items():
        words = {flag.what: flag.message for flag in comparison.flags if flag.variant == variant}
        one = rows[0]
        cosine = next((row.attribution_cosine for row in rows if row.attribution_cosine is not None), None)
        shared = [
            Cell(_count(one.parameters)),
            Cell(_count(one.macs)),
            Cell(_megabytes(one.file_bytes), f"÷ {one.size_ratio:.2f}" if one.size_ratio != 1 else "", words.get("file", "")),
            Cell("✓" if one.reload == EQUAL else one.reload.split(":")[0], "", words.get("reload", "")),
            Cell("–" if cosine is None else f"{cosine:.2f}"),
        ]
        origin = next((row.origin for row in rows if row.origin and not row.origin.startswith(f"{variant}, ")), None)
        yield {
            "name": variant,
            "origin": origin.rpartition(", ")[0] if origin else "",
            "shared": shared,
            "forms": [_form(row, words if row.flags else {}) for row in rows],
        }


def _form(row: Measurement, words: dict[str, str]) -> dict[str, Any]:
    change = Cell("–")
    if row.change is not None and row.change_low is not None and row.change_high is not None:
        interval = f"{100 * row.change_low:+.2f} … {100 * row.change_high:+.2f}"
        change = Cell(_signed(row.change), interval.replace("-", "−"), words.get("accuracy", ""))
    speeds = [
        Cell(
            _milliseconds(latency.p50_ms),
            f"{_milliseconds(latency.p95_ms)} · {latency.speed_ratio:.2f}×",
            words.get(f"batch{latency.batch}" if index else "latency", ""),
        )
        for index, latency in enumerate(row.latencies)
    ]
    return {
        "name": row.form,
        "frontier": row.frontier,
        "cells": [
            Cell(f"{100 * row.accuracy:.2f}", f"{100 * row.accuracy_low:.1f} – {100 * row.accuracy_high:.1f}"),
            change,
            *speeds,
            Cell("–" if row.memory_bytes is None else _megabytes(row.memory_bytes), "", words.get("memory", "")),
            Cell(f"{100 * row.agreement:.2f}", f"{row.kl:.1e}".replace("e-0", "e−").replace("e-", "e−").replace("e+00", "")),
        ],
    }


def _text_headings(comparison: Comparison) -> list[str]:
    speeds = [h for latency in comparison.measurements[0].latencies for h in (f"ms at {latency.batch}", "speed")]
    return [
        *("variant", "form", "accuracy", "95 % interval", "change", "95 % interval"),
        *(*speeds, "parameters", "file", "size", "memory", "agrees", "reload", "worse in"),
    ]


def _text_row(m: Measurement) -> list[str]:
    change = ["–", "–"]
    if m.change is not None and m.change_low is not None and m.change_high is not None:
        change = [f"{100 * m.change:+.2f}", f"{100 * m.change_low:+.2f} … {100 * m.change_high:+.2f}"]
    return [
        m.variant,
        m.form + (" *" if m.frontier else ""),
        f"{m.accuracy:.2%}",
        f"{m.accuracy_low:.1%} – {m.accuracy_high:.1%}",
        *change,
        *(cell for latency in m.latencies for cell in (f"{latency.p50_ms:.2f}", f"× {latency.speed_ratio:.2f}")),
        f"{m.parameters:,}",
        _bytes(m.file_bytes),
        f"÷ {m.size_ratio:.2f}",
        "–" if m.memory_bytes is None else _bytes(m.memory_bytes),
        f"{m.agreement:.2%}",
        m.reload.split(":")[0],
        " ".join(m.flags),
    ]


# Beneath the totals -----------------------------------------------------------------------------------------------------


def _classes(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """By variant: the classes that lost most, and whether that is more than chance."""
    by_variant: dict[str, list[ClassChange]] = {}
    for change in comparison.classes:
        by_variant.setdefault(change.variant, []).append(change)
    for variant, changes in by_variant.items():
        lost = [change for change in changes if change.after < change.before][:CLASSES]
        sure = sum(change.sure and change.after < change.before for change in changes)
        rows = [
            (
                change.name,
                Cell(f"{change.samples:,}"),
                Cell(f"{100 * change.before:.1f}"),
                Cell(f"{100 * change.after:.1f}"),
                Cell(_signed(change.after - change.before, 1), flag="More than chance." if change.sure else ""),
                Cell(f"{100 * change.change_low:+.1f} … {100 * change.change_high:+.1f}".replace("-", "−")),
            )
            for change in lost
        ]
        verdict = (
            "No class lost."
            if not lost
            else f"{sure} of {len(changes)} classes lost more than chance explains."
            if sure
            else f"Among {len(changes)} classes, chance alone would explain these."
        )
        yield {"variant": variant, "origin": changes[0].origin, "rows": rows, "verdict": verdict}


def _moved(comparison: Comparison, names: list[str]) -> Iterator[dict[str, Any]]:
    def name(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    by_variant: dict[str, list[Moved]] = {}
    for moved in comparison.moved:
        by_variant.setdefault(moved.variant, []).append(moved)
    for variant, samples in by_variant.items():
        tiles = [
            {
                "picture": moved.picture,
                "before": heat(moved.before),
                "after": heat(moved.after),
                "long": len(moved.before) == 1,
                "title": f"sample {moved.sample}, {name(moved.label)}",
                "answer": name(moved.answer)
                if moved.answer == moved.new_answer
                else f"{name(moved.answer)} → {name(moved.new_answer)}",
                "cosine": f"{moved.cosine:.2f}".replace("-", "−"),
                "rank": f"{moved.rank:.2f}".replace("-", "−"),
            }
            for moved in samples[:SAMPLES]
        ]
        yield {
            "variant": variant,
            "tiles": tiles,
            "samples": len(samples),
            "cosine": f"{sum(m.cosine for m in samples) / len(samples):.2f}",
            "rank": f"{sum(m.rank for m in samples) / len(samples):.2f}",
        }


# Numbers ----------------------------------------------------------------------------------------------------------------


def _signed(share: float, digits: int = 2) -> str:
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def _count(count: int | None) -> str:
    if count is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if count < 100 * size else 1}f} {unit}"
    return str(count)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _megabytes(count: int) -> str:
    if count < 1000:
        return f"{count / 1e6:.1g}"
    return f"{count / 1e6:.{3 if count < 1e6 else 2 if count < 1e8 else 1}f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
