"""What travels from the kernel to a live plot: bounded curves and heat maps, and the frames that bring a page up to date.

* :class:`Line` — a growing curve kept to a number of points; every extreme of the whole range stays.
* :class:`Columns` — a growing heat map (rows × steps) kept to a number of columns; neighbours merge by maximum or by sum.
* :class:`Frame` — one message: a list of operations and one buffer of float32 for all of them.

Page and kernel hold the same numbers. A change is a *splice* — "from index ``at`` on, these" — which covers an append, the
unfinished bucket at the end, and what a restarted run takes back; *halve* merges neighbours on both sides, so that no history
is sent twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

POINTS = 1000
"""Most points of a curve, and most columns of a heat map, that a page is ever sent."""


@dataclass
class Frame:
    """Operations of one message. ``buffer`` holds the float32 values of all of them, in order."""

    operations: list[dict[str, Any]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)

    def add(self, operation: str, name: str, *values: np.ndarray, packed: np.ndarray | None = None, **facts: Any) -> None:
        """Add an operation with its values; ``packed`` are bytes, sent four to a float."""
        self.operations.append({"op": operation, "name": name, **facts})
        self.parts.extend(np.ascontiguousarray(v, dtype="<f4").tobytes() for v in values)
        if packed is not None:
            content = packed.tobytes()
            self.parts.append(content + bytes(-len(content) % 4))

    @property
    def buffer(self) -> bytes:
        return b"".join(self.parts)

    def __bool__(self) -> bool:
        return bool(self.operations)


class Line:
    """A curve of at most ``limit`` points.

    Up to ``limit`` readings it holds them all. Then it halves itself, four points to their lowest and highest, and buckets
    what follows alike; the first point and the last stay.
    """

    def __init__(self, limit: int = POINTS) -> None:
        self._limit = limit - 3  # room for the unfinished bucket: lowest, highest, last
        self._points: list[tuple[float, float]] = []
        self._open: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None
        self._bucket = 1
        self._sent = 0

    def __len__(self) -> int:
        return len(self._points) + len(self._tail())

    def extend(self, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Take readings; ``xs`` must not decrease. NaN in ``ys`` is a gap."""
        for point in zip(xs, ys, strict=True):
            self._last = point
            self._open.append(point)
            if len(self._open) == self._bucket:
                self._points.extend(_extremes(self._open))
                self._open = []
                if len(self._points) > self._limit:
                    self._halve()

    def clear(self) -> None:
        self._points, self._open, self._last, self._bucket, self._sent = [], [], None, 1, 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y of all points, as float64."""
        points = np.array([*self._points, *self._tail()], dtype="f8").reshape(-1, 2)
        return points[:, 0], points[:, 1]

    def write(self, frame: Frame, name: str, whole: bool = False) -> None:
        """Add to ``frame`` what changed since the last call, or everything."""
        at = 0 if whole else min(self._sent, len(self._points))
        points = np.array([*self._points[at:], *self._tail()], dtype="f4").reshape(-1, 2)
        frame.add("line", name, points[:, 0], points[:, 1], at=at, n=len(points))
        self._sent = len(self._points)

    def _tail(self) -> list[tuple[float, float]]:
        """The unfinished bucket and the last reading, to be replaced by what follows."""
        tail = _extremes(self._open) if self._open else []
        if self._last is not None and [*self._points[-1:], *tail][-1] is not self._last:
            tail.append(self._last)
        return tail

    def _halve(self) -> None:
        first, *rest = self._points
        halved = [first]
        for start in range(0, len(rest), 4):
            halved.extend(_extremes(rest[start : start + 4]))
        self._points = halved
        self._bucket = 4 if self._bucket == 1 else self._bucket * 2
        self._sent = 0


def _extremes(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of ``points``, in their order; finite ones count before others."""
    known = [p for p in points if np.isfinite(p[1])] or list(points)
    if len(known) == 1:
        return list(known)
    low, high = min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])
    if low is high:
        return [low] if low == known[-1] else [low, known[-1]]
    return sorted((low, high), key=known.index)


class Columns:
    """A heat map of fixed rows and at most ``limit`` columns, each the merge of ``stride`` readings.

    Args:
        rows: number of rows.
        limit: most columns.
        merge: ``"max"`` keeps the extremes of norms; ``"sum"`` adds histograms.
    """

    def __init__(self, rows: int, limit: int = POINTS, merge: Literal["max", "sum"] = "max") -> None:
        self.rows, self.merge, self.stride = rows, merge, 1
        self._limit = limit - limit % 2
        self._x = np.zeros(self._limit + 1, dtype="f4")
        self._values = np.full((self._limit + 1, rows), np.nan, dtype="f4")
        self._closed = self._filled = 0
        self._sent = 0
        self._halvings: list[int] = []  # not yet told to the page: how many merged columns each left of those it holds

    def __len__(self) -> int:
        return self._closed + bool(self._filled)

    def append(self, x: float, column: np.ndarray) -> None:
        """Take one reading of all rows; ``x`` must not decrease."""
        at = self._closed
        if self._filled == 0:
            self._x[at], self._values[at] = x, column
        else:
            self._values[at] = self._merged(self._values[at], np.asarray(column, dtype="f4"))
        self._filled += 1
        if self._filled == self.stride:
            self._closed, self._filled = self._closed + 1, 0
            if self._closed >= self._limit:
                self._halve()

    def part(self, rows: slice) -> Columns:
        """A copy of some rows, which grows on its own; nothing of it has been sent."""
        copy = Columns(len(range(*rows.indices(self.rows))), self._limit, self.merge)
        copy._x[:], copy._values[:] = self._x, self._values[:, rows]
        copy.stride, copy._closed, copy._filled = self.stride, self._closed, self._filled
        return copy

    @property
    def x(self) -> np.ndarray:
        """The first step of each column."""
        return self._x[: len(self)]

    @property
    def values(self) -> np.ndarray:
        """Shape (columns, rows)."""
        return self._values[: len(self)]

    def write(self, frame: Frame, name: str, whole: bool = False) -> None:
        """Add to ``frame`` what changed since the last call, or everything."""
        if whole:
            self._halvings, self._sent = [], 0
        for keep in self._halvings:
            frame.add("halve", name, how=self.merge, keep=keep)
        at, end = self._sent, len(self)
        frame.add("columns", name, self._x[at:end], self._values[at:end], at=at, n=end - at, rows=self.rows)
        self._sent, self._halvings = self._closed, []

    def _halve(self) -> None:
        half = self._closed // 2
        pairs = self._values[: 2 * half].reshape(half, 2, self.rows)
        self._values[:half] = self._merged(pairs[:, 0], pairs[:, 1])
        self._x[:half] = self._x[: 2 * half : 2]
        self._sent //= 2
        if self._sent:  # else what is sent next starts from the first column anyway
            self._halvings.append(self._sent)
        self._closed, self.stride = half, self.stride * 2

    def _merged(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if self.merge == "sum":
            return a + b
        return np.fmax(a, b)
