"""What an Inspector knows of a run: curves and heat maps of bounded size, grown from events and reading segments.

* :class:`Recording` — takes events (:meth:`~Recording.take_events`), reads new segments (:meth:`~Recording.read`), and writes
  what changed into a :class:`widgets.frames.Frame`. Ranks' readings of a step come together in :mod:`widgets.inspector.ranks`.

Names in frames: lines ``loss``, ``rate``, ``metric:NAME``, ``memory:RANK:FIELD``, ``time:RANK:FIELD``; heat maps ``gradients``
(norms, layer × step), ``gradients:QUANTITY`` of the chosen other quantity, and ``layer`` (value bin × step of the chosen layer);
``memory:parts`` (holder × step, of the rank shown); ``activations``, the distributions of all layers at the chosen step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from widgets.frames import Columns, Frame, Line
from widgets.inspector.histograms import Distributions, distributions, edges, levels
from widgets.inspector.memory import Holding
from widgets.inspector.quantities import QUANTITIES
from widgets.inspector.ranks import MOMENTS, STATS, Join, activation_rows, added, gradient_rows, highest
from workbench import events, storage
from workbench.run import Run

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("gradients", "activations", "memory", "memory_layers", "communication")
COLUMNS = 500
"""Columns of the gradients' heat map: a card is about that many pixels wide."""
HISTORY = 120
"""Columns of the activations' history, which holds every layer's histograms."""
BATCH = 200
"""Tables read at once, so that a long history appears step by step."""
FIELDS = ("allocated", "reserved", "peak")
TIMES = ("busy", "waited", "step")
"""Of a step, in seconds: a rank's own work, its waits for samples, and both with its waits for other ranks."""
SAMPLING = ("error", "overhead")
"""What the probes may tell of their own: a sampled share's standard error, and the share of a run's time that reading takes."""


class Recording:
    """A run, bounded for display.

    Args:
        run: the run.
        rank: whose readings the heat maps show; None merges all ranks (norms: the largest; distributions: added).
    """

    def __init__(self, run: Run, rank: int | None = None) -> None:
        self.run, self.rank = run, rank
        self.layer: str | None = None
        self.quantity = "norm"
        self.step: int | None = None
        self._layers: dict[str, dict[str, int]] = {"gradients": {}, "activations": {}}
        self.reset()

    def reset(self) -> None:
        """Forget everything, to be read anew."""
        self.lines: dict[str, Line] = {"loss": Line()}
        self.total = 0.0
        self.world_size = 1
        self.overhead: float | None = None
        self.started: events.AttemptStarted | None = None
        self._starts: list[tuple[int, int]] = []
        self._sent_facts: dict[str, Any] = {}
        self._anew: set[str] = set()
        self.reset_readings()

    def reset_readings(self) -> None:
        self._segments = storage.SegmentReader(self.run.path / "readings")
        self._joins = {"gradients": Join(highest), "activations": Join(added)}
        self.gradients: Columns | None = None
        self.others: dict[str, Columns] = {}
        self.activations: Columns | None = None
        self.stats: dict[float, np.ndarray] = {}  # [layers, STATS] by the step of a column of the activations' history
        self.latest_stats = np.zeros((0, len(STATS)))
        self.sampling: dict[str, float] = {}
        self.bins = 0
        self._detail: Columns | None = None
        self.tables: dict[str, dict[int, tuple[list[Any], deque[Any]]]] = {kind: {} for kind in KINDS}
        self.links: dict[str, Any] = {}
        self._exposed: dict[int, float] = {}
        self.holding = Holding()
        for name in [n for n in self.lines if n.startswith(("memory:", "time:"))]:
            del self.lines[name]
        self._changed = {"gradients", "activations", "layer", *self.lines}

    # -- taking in ------------------------------------------------------------------------------------------------

    def take_events(self, fresh: Sequence[events.Event], anew: bool) -> None:
        """Take events; with ``anew``, those of before no longer count."""
        if anew:
            self.reset()
        for event in fresh:
            if isinstance(event, events.AttemptStarted):
                self._starts.append((event.attempt, event.step))
                self.started, self.world_size = event, event.world_size
                if len(self._starts) > 1 and not anew:
                    self.reset_readings()  # a reading may lie past the last event, and past the checkpoint
            elif isinstance(event, events.Steps):
                values = [float("nan") if v is None else v for v in event.loss]
                self._extend("loss", range(event.first, event.first + len(values)), values)
                if event.samples_per_s:
                    self._extend("rate", [event.step], [event.samples_per_s])
            elif isinstance(event, events.ReadingsTimed):
                self.overhead = event.overhead
            elif isinstance(event, events.Evaluated):
                for name, value in event.metrics.items():
                    self._extend(f"metric:{name}", [event.step], [value])

    def read(self, *, last: bool = False) -> bool:
        """Read tables not yet read; True when more are waiting. ``last``: no more will come."""
        more = fresh = False
        for kind in KINDS:
            found = list(islice(self._segments.read(kind), BATCH))
            more, fresh = more or len(found) == BATCH, fresh or bool(found)
            for attempt, rank, table in found:
                if not self._take(kind, attempt, rank, table):
                    self.reset_readings()  # a layer not seen before: the heat map gets a row for it from the start
                    return True
        if not more and (fresh or last):
            for step, values in self._joins["gradients"].take(last):
                self._append_gradients(step, values)
            for step, (counts, stats) in self._joins["activations"].take(last):
                self._append_activations(step, counts, stats)
        return more

    def _take(self, kind: str, attempt: int, rank: int, table: pa.Table) -> bool:
        limit = min((step for number, step in self._starts if number > attempt), default=None)
        if limit is not None:
            table = table.filter(np.asarray(table["step"]) <= limit)
        if not table.num_rows:
            return True
        head, tail = self.tables[kind].setdefault(rank, ([], deque(maxlen=12)))
        slim = table.drop_columns("histogram") if kind == "activations" else table
        (head if len(head) < 3 else tail).append(slim)
        self.sampling |= {name: table[name][-1].as_py() for name in SAMPLING if name in table.column_names}
        if kind == "memory":
            for name in FIELDS:
                self._extend(f"memory:{rank}:{name}", table["step"].to_pylist(), table[name].to_pylist())
            self.total = max(self.total, float(table["total"][0].as_py()))
            if self._alone(rank) and self.holding.take(table):
                self._changed.add("memory:parts")
            return True
        if kind == "memory_layers":
            if self._alone(rank):
                self.holding.take_layers(table)
            return True
        if kind == "communication":
            self._take_times(rank, table)
            return True
        if self.rank not in (None, rank):
            return True
        rows, known = self._layers[kind], len(self._layers[kind])
        index = np.array([rows.setdefault(name, len(rows)) for name in table["layer"].to_pylist()])
        if known and len(rows) > known:
            return False
        values = gradient_rows(table) if kind == "gradients" else activation_rows(table)
        if kind == "activations":
            self.bins = values.shape[1] - MOMENTS
        steps = np.asarray(table["step"])
        bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            whole = np.full((len(rows), values.shape[1]), np.nan)
            whole[index[begin:end]] = values[begin:end]
            self._joins[kind].put(int(steps[begin]), rank, whole)
        return True

    def _alone(self, rank: int) -> bool:
        """Whether this rank is the one shown, and what holds its memory with it."""
        return self.rank == rank or (self.rank is None and self.world_size == 1)

    def _take_times(self, rank: int, table: pa.Table) -> None:
        steps, busy, waited, exposed = (np.asarray(table[name], dtype="f8") for name in ("step", "busy", "waited", "exposed"))
        known = np.isfinite(busy)  # not of a step that followed no other
        for name, seconds in zip(TIMES, (busy, waited, busy + exposed), strict=True):
            self._extend(f"time:{rank}:{name}", steps[known].tolist(), seconds[known].tolist())
        if known.any():
            self._exposed[rank] = float((exposed[known] / (busy + exposed)[known])[-1])
        told = {name: table[name][-1].as_py() for name in ("link", "hosts", "network", "bandwidth")}
        self.links = {name: None if value != value else value for name, value in told.items()}

    def _append_gradients(self, step: int, values: np.ndarray) -> None:
        if self.gradients is None:
            self.gradients = Columns(len(values), COLUMNS)
        self.gradients.append(step, values[:, 0])
        self._changed.add("gradients")
        for quantity, column in zip(QUANTITIES[1:], values.T[1:], strict=True):
            grid = self.others.get(quantity.name)
            if grid is None:
                if np.isnan(column).all():
                    continue
                grid = self.others[quantity.name] = Columns(len(values), COLUMNS)
            grid.append(step, column)
            self._changed.add(f"gradients:{quantity.name}")

    def _append_activations(self, step: int, counts: np.ndarray, stats: np.ndarray) -> None:
        if self.activations is None:
            self.activations = Columns(counts.size, HISTORY, merge="sum")
        self.activations.append(step, counts.ravel())
        columns = {float(x) for x in self.activations.x}
        self.stats = {x: held for x, held in [*self.stats.items(), (float(step), stats)] if x in columns or x == step}
        self.latest_stats = stats
        rows = self._rows_of_layer()
        if rows is not None:
            if self._detail is None:
                self._detail = self.activations.part(rows)
            else:
                self._detail.append(step, counts.ravel()[rows])
            self._changed.add("layer")
        if self.step is None:
            self._changed.add("activations")

    def _extend(self, name: str, xs: Iterable[float], ys: Iterable[float]) -> None:
        self.lines.setdefault(name, Line()).extend(xs, ys)
        self._changed.add(name)

    # -- choices of the viewer ----------------------------------------------------------------------------------------

    def choose_layer(self, name: str | None) -> None:
        """Show one layer's history: a parameter's name or a module's path; None closes it."""
        self.layer = name
        rows = self._rows_of_layer()
        self._detail = self.activations.part(rows) if self.activations is not None and rows is not None else None
        self._changed.add("layer")

    def choose_quantity(self, name: str) -> None:
        """Show another quantity of the gradients: the ``name`` of one of ``QUANTITIES``."""
        self.quantity = name
        self._anew.add(f"gradients:{name}")

    def choose_step(self, step: int | None) -> None:
        """Show the distributions at ``step``, or at the last reading before it; None follows the latest."""
        self.step = step
        self._changed.add("activations")

    def module_of_layer(self) -> str | None:
        """The module whose activations belong to the chosen layer, which may be a parameter's name."""
        if self.layer is None:
            return None
        rows = self._layers["activations"]
        return next((n for n in (self.layer, self.layer.rpartition(".")[0]) if n in rows), None)

    def layers(self, kind: str) -> list[str]:
        return list(self._layers[kind])

    def _rows_of_layer(self) -> slice | None:
        module = self.module_of_layer()
        if module is None or not self.bins:
            return None
        row = self._layers["activations"][module]
        return slice(row * self.bins, (row + 1) * self.bins)

    # -- giving out ---------------------------------------------------------------------------------------------------

    def distributions(self) -> Distributions:
        """Every layer's histogram at the chosen step."""
        counts, at = self._counts()
        assert self.activations is not None
        return distributions(counts, int(self.activations.x[at]), at)

    def _counts(self) -> tuple[np.ndarray, int]:
        """[layers, bins] at the chosen step, and its column."""
        assert self.activations is not None
        at = len(self.activations) - 1
        if self.step is not None:
            at = max(0, int(np.searchsorted(self.activations.x, self.step, side="right")) - 1)
        return np.nan_to_num(self.activations.values[at].reshape(-1, self.bins).astype("f8")), at

    def write(self, frame: Frame, whole: bool = False) -> None:
        """Add what changed since the last call to ``frame``, or everything."""
        changed = {"gradients", f"gradients:{self.quantity}", "activations", "layer", *self.lines} if whole else self._changed
        changed, anew = changed | self._anew, self._anew
        self._changed, self._anew = set(), set()
        if whole:
            self._sent_facts.clear()
        for name, value in self.facts().items():
            self.fact(frame, name, value)
        if self.holding.stack is not None and (whole or "memory:parts" in changed):
            _write(self.holding.stack, frame, "memory:parts", whole)
        for name in sorted(changed & set(self.lines)):
            self.lines[name].write(frame, name, whole)
        if "gradients" in changed:
            _write(self.gradients, frame, "gradients", whole)
        other = f"gradients:{self.quantity}"
        if other in changed and self.quantity in self.others:
            _write(self.others[self.quantity], frame, other, whole or other in anew)
        if "activations" in changed and self.activations is not None:
            self._write_distributions(frame)
        if "layer" in changed:
            _write(self._detail, frame, "layer", whole)

    def facts(self) -> dict[str, Any]:
        """What the page is told beside numbers: names, choices, units, by the name of the fact."""
        metrics = [n.removeprefix("metric:") for n in self.lines if n.startswith("metric:")]
        ranks = sorted({int(n.split(":")[1]) for n in self.lines if n.startswith("memory:")})
        told = [q for q in QUANTITIES if q.name == "norm" or q.name in self.others]
        choice = {"layer": self.layer, "module": self.module_of_layer(), "rank": self.rank, "quantity": self.quantity}
        sampling = {**self.sampling, "overhead": self.sampling.get("overhead", self.overhead)}
        facts: dict[str, Any] = {
            "metrics": metrics,
            "times": self.times(),
            "memory": {"ranks": ranks, "total": self.total},
            "layers": {kind: self.layers(kind) for kind in ("gradients", "activations")},
            "choice": choice,
            "quantities": [{n: getattr(q, n) for n in ("name", "label", "log", "block", "meaning")} for q in told],
            "sampling": {n: float(f"{v:.3g}") for n, v in sampling.items() if v is not None and 0 <= v <= 1},
        }
        if self.holding.stack is not None:
            facts["memory:holding"] = self.holding.fact()
        return facts | ({"edges": edges(self.bins)} if self.bins else {})

    def times(self) -> dict[str, Any]:
        """Ranks whose steps were timed, their links, and the share of a step for which the rank that waits least waits."""
        exposed = round(min(self._exposed.values()), 3) if self._exposed else None
        return {"ranks": sorted(self._exposed), "exposed": exposed, **self.links}

    def fact(self, frame: Frame, name: str, value: Any) -> None:
        """Add a fact when it is not what the page knows."""
        if self._sent_facts.get(name, _write) != value:
            self._sent_facts[name] = value
            frame.add("fact", name, value=value)

    def _write_distributions(self, frame: Frame) -> None:
        assert self.activations is not None
        counts, at = self._counts()
        step, of = float(self.activations.x[at]), len(self.activations)
        stats = self.latest_stats if at == of - 1 else self.stats.get(step, np.zeros((0, len(STATS))))
        packed = levels(counts)
        shape = {"rows": packed.shape[0], "bins": packed.shape[1], "stats": stats.size}
        frame.add("levels", "activations", stats, packed=packed, **shape, step=int(step), at=at, of=of)


def _write(columns: Columns | None, frame: Frame, name: str, whole: bool) -> None:
    if columns is not None:
        columns.write(frame, name, whole)
    elif not whole:
        frame.add("forget", name)
