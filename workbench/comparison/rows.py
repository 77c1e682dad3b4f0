"""From counts and times to rows: intervals, ratios, the frontier, and what each class lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from workbench.comparison.forms import Form, Score, Variant, deployed_forms, origins, references
from workbench.comparison.intervals import holm, paired_difference, sign_test, wilson
from workbench.comparison.result import ClassChange, Latency, Measurement, Moved, on_frontier

Times = list[list[float]]
"""Milliseconds of one form by batch size and round."""


def measurements(
    loaded: Mapping[str, Variant],
    forms: list[Form],
    scores: list[Score],
    latencies: list[Times],
    memory: Sequence[int | None],
    reloaded: Mapping[str, str],
    moved: Sequence[Moved],
    batch_sizes: Sequence[int],
) -> list[Measurement]:
    """One row a form, in order."""
    baseline = next(iter(loaded.values()))
    medians = [[percentile(times, 50) for times in by_size] for by_size in latencies]
    judged = deployed_forms(forms)
    first = [i for i, form in enumerate(forms) if form.variant == next(iter(loaded))]
    like = {forms[i].like: medians[i] for i in reversed(first)}
    rows = []
    for index, (form, score, paired) in enumerate(zip(forms, scores, references(forms, loaded), strict=True)):
        variant, right = loaded[form.variant], sum(score.right)
        low, high = wilson(right, score.samples)
        lost, won = disagreements(scores[paired].right, score.right) if paired is not None else (0, 0)
        change = paired_difference(won, lost, score.samples) if paired is not None else (None, None)
        own = [m for m in moved if m.variant == form.variant] if index == judged[form.variant] else []
        base = like.get(form.like, medians[judged[forms[0].variant]])
        rows.append(
            Measurement(
                variant=form.variant,
                form=form.name,
                origin=None if paired is None else f"{forms[paired].variant}, {forms[paired].name}",
                accuracy=right / score.samples,
                accuracy_low=low,
                accuracy_high=high,
                change=None if paired is None else (won - lost) / score.samples,
                change_low=change[0],
                change_high=change[1],
                lost=lost,
                won=won,
                parameters=variant.parameters,
                macs=variant.macs,
                file_bytes=variant.file_bytes,
                memory_bytes=memory[index],
                latencies=tuple(
                    Latency(batch, median, percentile(times, 95), before / median)
                    for batch, median, times, before in zip(batch_sizes, medians[index], latencies[index], base, strict=True)
                ),
                agreement=score.agreeing / score.samples,
                kl=max(0.0, score.kl / score.samples),
                size_ratio=baseline.file_bytes / variant.file_bytes,
                reload=reloaded[form.variant],
                attribution_cosine=sum(m.cosine for m in own) / len(own) if own else None,
                attribution_rank=sum(m.rank for m in own) / len(own) if own else None,
            )
        )
    best = on_frontier([costs(row) for row in rows])
    return [replace(row, frontier=frontier) for row, frontier in zip(rows, best, strict=True)]


def costs(row: Measurement) -> tuple[float, ...]:
    """What the frontier is drawn by, the lower the better: errors, latency, bytes."""
    return 1 - row.accuracy, row.latency_p50_ms, row.file_bytes


def class_changes(
    loaded: Mapping[str, Variant], forms: list[Form], scores: list[Score], labels: Sequence[int], names: Sequence[str]
) -> list[ClassChange]:
    """Every variant's classes against what it came from, by its deployed form; the class that lost most first."""
    deployed = deployed_forms(forms)
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    found: list[ClassChange] = []
    for name, origin in origins(loaded).items():
        now, then = scores[deployed[name]].right, scores[deployed[origin]].right
        counts = {label: disagreements([then[i] for i in at], [now[i] for i in at]) for label, at in members.items()}
        sure = dict(zip(counts, holm([sign_test(lost, won) for lost, won in counts.values()]), strict=True))
        made = []
        for label, (lost, won) in counts.items():
            at = members[label]
            low, high = paired_difference(won, lost, len(at))
            made.append(
                ClassChange(
                    variant=name,
                    origin=origin,
                    label=label,
                    name=names[label] if label < len(names) else str(label),
                    samples=len(at),
                    before=sum(then[i] for i in at) / len(at),
                    after=sum(now[i] for i in at) / len(at),
                    lost=lost,
                    won=won,
                    change_low=low,
                    change_high=high,
                    sure=sure[label],
                )
            )
        found += sorted(made, key=lambda change: (change.after - change.before, change.label))
    return found


def disagreements(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """(lost, won): samples that only the first, and only the second, has right."""
    pairs = list(zip(before, after, strict=True))
    return sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (position - low)
