"""What a comparison found: one row a variant and form, what is wrong with which, and what changed beneath the totals.

* :class:`Measurement` — a row; :class:`Flag` — a figure of it that got worse, and why.
* :class:`ClassChange`, :class:`Moved` — a class's accuracy, and a sample's attribution, before and after.
* :class:`Comparison` — all of them: as a frame, CSV, JSON, a figure, a page, text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.storage import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call at one batch size; the ratio is to the first variant in the like form: above 1 is faster."""

    batch: int
    p50_ms: float
    p95_ms: float
    speed_ratio: float


@dataclass(frozen=True)
class Measurement:
    """One variant in one form. Ratios are to the first variant in the like form: above 1 is smaller or faster."""

    variant: str
    form: str
    origin: str | None
    """What it is paired with, as ``"variant, form"``; None for the first row."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    change: float | None
    """Of the accuracy against the origin, on the same samples, with its 95 % interval."""
    change_low: float | None
    change_high: float | None
    lost: int
    """Samples that the origin has right and this has wrong."""
    won: int
    parameters: int
    macs: int | None
    """Multiply-accumulates of one sample."""
    file_bytes: int
    memory_bytes: int | None
    """Peak of a call at the largest batch size: weights, the compiler's copies of them, and activations."""
    latencies: tuple[Latency, ...]
    """By batch size, rising."""
    agreement: float
    """Share of the samples with the first row's answer."""
    kl: float
    """Mean divergence of the first row's probabilities from these, in nats."""
    size_ratio: float
    reload: str
    """"bit-equal", or what went wrong when it was loaded in a fresh process."""
    attribution_cosine: float | None = None
    """Mean cosine of its attributions with the first variant's."""
    attribution_rank: float | None = None
    frontier: bool = False
    """Whether no other row is at least as accurate, as fast at the smallest batch and as small, and better in one."""
    flags: tuple[str, ...] = ()
    """Figures that got worse: the ``what`` of its flags."""

    @property
    def latency_p50_ms(self) -> float:
        """Median at the smallest batch size."""
        return self.latencies[0].p50_ms

    def with_flags(self, flags: Iterable[Flag]) -> Measurement:
        """This row, marked with those of ``flags`` that are its own."""
        return replace(self, flags=tuple(f.what for f in flags if (f.variant, f.form) == (self.variant, self.form)))

    def flat(self) -> dict[str, Any]:
        """All of it by name: the smallest batch's latency as ``latency_p50_ms``, another's as ``batch32_p50_ms``."""
        values = asdict(self)
        for index, latency in enumerate(values.pop("latencies")):
            batch = f"batch{latency.pop('batch')}_" if index else ""
            found = {
                f"{batch or 'latency_'}p50_ms": latency["p50_ms"],
                f"{batch or 'latency_'}p95_ms": latency["p95_ms"],
                f"{batch}speed_ratio": latency["speed_ratio"],
            }
            values |= found
        return values | {"flags": " ".join(self.flags)}


@dataclass(frozen=True)
class Flag:
    """A figure in which a variant is worse than what it came from, in words."""

    variant: str
    form: str
    what: str
    """``accuracy``, ``file``, ``memory``, ``latency``, ``batch32`` …, ``reload``, ``frontier`` or ``bf16``."""
    message: str


@dataclass(frozen=True)
class ClassChange:
    """Accuracy on one class, of a variant and of what it came from."""

    variant: str
    origin: str
    label: int
    name: str
    samples: int
    before: float
    after: float
    lost: int
    won: int
    change_low: float
    change_high: float
    sure: bool
    """Whether it is more than chance among so many classes (McNemar's exact test, Holm's correction, 5 %)."""


@dataclass(frozen=True)
class Moved:
    """What speaks for the baseline's answer on one sample, before and after: maps of credits, rows of numbers."""

    variant: str
    sample: int
    """Position in the data."""
    label: int
    answer: int
    """Of the first variant, whose output is explained."""
    new_answer: int
    cosine: float
    rank: float
    before: list[list[float]]
    after: list[list[float]]
    picture: str = ""
    """The input as a data URI; empty where it is no image, or moved less than others."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`compare` found; shows itself in a notebook.

    ``frame()``, ``to_csv(path)``, ``to_html(path)``, ``figure()``, ``warnings``; ``classes`` and ``moved`` tell what lies
    beneath.
    """

    measurements: list[Measurement]
    flags: list[Flag] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """On the measurement itself: a busy machine, what was left out."""
    classes: list[ClassChange] = field(default_factory=list)
    """By variant; the class that lost most first."""
    moved: list[Moved] = field(default_factory=list)
    """By variant; the sample that moved most first."""
    class_names: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """Everything to beware of, as sentences."""
        return [flag.message for flag in self.flags] + self.notes

    def frame(self) -> pd.DataFrame:
        """One row a variant and form; latencies in milliseconds, sizes in bytes, divergence in nats, shares from 0 to 1."""
        import pandas as pd

        rows = pd.DataFrame([measurement.flat() for measurement in self.measurements])
        return rows.astype({"macs": "Int64", "memory_bytes": "Int64"})  # whole numbers, even where one is missing

    def classes_frame(self) -> pd.DataFrame:
        """One row a variant and class, the class that lost most first."""
        import pandas as pd

        return pd.DataFrame([asdict(change) for change in self.classes])

    def figure(self) -> go.Figure:
        """Accuracy against latency and file size, with the frontier, to zoom and point at."""
        from workbench.comparison.drawing import figure

        return figure(self.measurements)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """All numbers in full precision, as :meth:`frame` names them; written to ``path`` too when given."""
        text = self.frame().to_csv(index=False)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), text)
        return text

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page that needs nothing else, light or dark as the reader's system is; written to ``path`` too when given."""
        from workbench.comparison.page import page

        html = page(self)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), html)
        return html

    def to_json(self) -> str:
        """All of it, for :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        values = json.loads(text)

        def build(kind: Any, rows: Iterable[Mapping[str, Any]]) -> list[Any]:
            return [kind(**row) for row in rows]

        measurements = [
            Measurement(**{**row, "latencies": tuple(build(Latency, row["latencies"])), "flags": tuple(row["flags"])})
            for row in values["measurements"]
        ]
        rest = {"flags": Flag, "classes": ClassChange, "moved": Moved}
        return cls(**{**values, "measurements": measurements, **{name: build(kind, values[name]) for name, kind in rest.items()}})

    def _repr_html_(self) -> str:
        from workbench.comparison.page import fragment

        return fragment(self)

    def __repr__(self) -> str:
        from workbench.comparison.page import text

        return text(self)


def on_frontier(points: list[tuple[float, ...]]) -> list[bool]:
    """Which points no other dominates: none is at least as low in every coordinate and lower in one."""

    def dominated(point: tuple[float, ...]) -> bool:
        return any(other != point and all(o <= p for o, p in zip(other, point, strict=True)) for other in points)

    return [not dominated(point) for point in points]
