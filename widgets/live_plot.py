"""Live plots that stay cheap: plotly.js once a page, binary appends, at most four redraws a second, 1,000 points a curve.

* :class:`LivePlot` — a chart of named curves: ``append``, ``clear``, ``redraw``.
* :class:`LiveWidget` — what live plots share: a lock, numbered frames (:mod:`widgets.frames`), the whole history for a page
  that is new or missed something, measured cost (:class:`Stats`), a static view where no page listens.
* :func:`is_static` — whether anybody is there to look at a live widget.

Widget messages arrive on other threads under ipykernel 7; ``LiveWidget._lock`` guards whatever they touch.
"""

from __future__ import annotations

import gzip
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from widgets.comm import answer_while_busy
from widgets.frames import Frame, Line
from workbench.errors import ConfigError, unknown

HERE = Path(__file__).parent
PERIOD = 0.25
"""Least seconds between two frames."""

_TRACE = {"label": "", "color": None, "mode": "lines", "axis": 1, "dash": None, "smooth": 0.0, "share": False}


def module(*names: str) -> str:
    """The JavaScript files ``names`` of this package as one ES module (anywidget modules cannot import each other)."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


_seen_page = False


def is_static() -> bool:
    """Whether output is for a file rather than a page: papermill, nbconvert, nbval, a script.

    ``WORKBENCH_STATIC`` (``1`` or ``0``) decides when set. Otherwise: no IPython kernel, or a cell that was sent by a program
    that cannot answer ``input()``, as those programs are and notebooks in a browser are not.
    """
    global _seen_page
    chosen = os.environ.get("WORKBENCH_STATIC", "").strip().lower()
    if chosen:
        return chosen not in ("0", "false", "no")
    try:
        from IPython import get_ipython
    except ImportError:
        return True
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return True
    # Sticky, since extensions of the page also run code in silence, without input.
    _seen_page = _seen_page or bool(getattr(kernel, "_allow_stdin", False))
    return not _seen_page


@dataclass
class Stats:
    """What a live widget costs. ``redraw_ms`` is measured in the page."""

    frames: int = 0
    snapshots: int = 0
    frame_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=2000))
    snapshot_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=100))
    redraw_ms: deque[float] = field(default_factory=lambda: deque(maxlen=2000))

    def summary(self) -> dict[str, float]:
        """Medians and 95th percentiles: bytes a frame, bytes of the whole, milliseconds a redraw."""
        rows: dict[str, float] = {"frames": self.frames, "snapshots": self.snapshots, "redraws": len(self.redraw_ms)}
        for name in ("frame_bytes", "snapshot_bytes", "redraw_ms"):
            values = list(getattr(self, name))
            if values:
                rows[f"{name}_median"] = round(float(np.median(values)), 1)
                rows[f"{name}_p95"] = round(float(np.percentile(values, 95)), 1)
        return rows


class PlotlyLoader(anywidget.AnyWidget):
    """Gives plotly.js to pages that lack it, compressed; one of it in a kernel (:func:`plotly_loader`)."""

    _esm = module("plotly_source.js", "plotly_loader.js")
    GRACE = 1.0

    def __init__(self) -> None:
        self.sent = 0
        self._heard = threading.Event()
        super().__init__()
        answer_while_busy(self)
        self.on_msg(self._answer)
        # A page that cannot reach the kernel while a cell blocks it gets plotly.js unasked.
        timer = threading.Timer(self.GRACE, self._give_unasked)
        timer.daemon = True
        timer.start()

    def _answer(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        self._heard.set()
        if not content.get("loaded"):
            self._give()

    def _give_unasked(self) -> None:
        if not self._heard.is_set():
            self._give()

    def _give(self) -> None:
        self.sent += len(compressed_plotly())
        self.send({}, [compressed_plotly()])


_plotly: list[bytes] = []
_loader: list[PlotlyLoader] = []
_loading = threading.Lock()


def compressed_plotly() -> bytes:
    """plotly.js, gzipped: a million and a half bytes."""
    from plotly.offline import get_plotlyjs

    with _loading:
        if not _plotly:
            _plotly.append(gzip.compress(get_plotlyjs().encode(), 6))
        return _plotly[0]


def plotly_loader() -> PlotlyLoader:
    """The kernel's loader, made when first needed, and again after it was closed."""
    if not _loader or _loader[0].comm is None:
        _loader[:] = [PlotlyLoader()]
    return _loader[0]


class LiveWidget(anywidget.AnyWidget):
    """Base of the live plots.

    A subclass adds to a :class:`Frame` what changed (``_changes``) and calls ``_publish``; ``_static_html`` is what it shows
    where nobody can interact with it.
    """

    def __init__(self, *, static: bool | None = None, **traits: Any) -> None:
        self.static = is_static() if static is None else static
        self.stats = Stats()
        self._lock = threading.RLock()
        self._sequence = 0
        super().__init__(**traits)
        if not self.static:
            plotly_loader()
            self.on_msg(self._on_page)

    def open(self) -> None:
        if not self.static:  # a static view opens no comm, so that nothing of it is stored with the notebook's widgets
            super().open()
            answer_while_busy(self)

    def close(self) -> None:
        layout = self.layout if self.comm is not None else None
        super().close()
        if layout is not None:
            layout.close()  # else ipywidgets keeps it for ever
        self.__dict__.pop("_repr_mimebundle_", None)  # ipywidgets disables it; a closed plot still shows its static view

    def _changes(self, frame: Frame, whole: bool) -> None:
        raise NotImplementedError(f"{type(self).__name__} must say what has changed.")

    def _static_html(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} must say how it looks where nothing runs.")

    def _publish(self, whole: bool = False) -> None:
        with self._lock:
            if self.comm is None:
                return
            frame = Frame()
            self._changes(frame, whole)
            if not frame and not whole:
                return
            self._sequence += 1
            content = {"kind": "frame", "sequence": self._sequence, "whole": whole, "operations": frame.operations}
            buffer = frame.buffer
            size = len(buffer) + sum(len(str(o)) for o in frame.operations)
            (self.stats.snapshot_bytes if whole else self.stats.frame_bytes).append(size)
            if whole:
                self.stats.snapshots += 1
            else:
                self.stats.frames += 1
            self.send(content, [buffer])

    def _on_page(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        if content.get("kind") == "hello":
            self._publish(whole=True)
        elif content.get("kind") == "drawn":
            self.stats.redraw_ms.extend(float(t) for t in content.get("times", []))
        else:
            self._on_request(content)

    def _on_request(self, content: Mapping[str, Any]) -> None:
        """Other messages of the page; runs on any thread."""

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        html = self._static_html()
        if self.static or self.comm is None:
            return {"text/plain": repr(self), "text/html": html}, {}
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return {**data, "text/html": html}, metadata


class LivePlot(LiveWidget):
    """A chart of named curves that grow.

    Args:
        traces: name → options, each optional: ``label``, ``color`` ("#rrggbb"), ``mode`` ("lines", "markers",
            "lines+markers"), ``axis`` (1 left, 2 right), ``dash`` ("dot", "dash"), ``smooth`` (0 to below 1: weight of an
            exponential average drawn over the faint raw curve), ``share`` (values from 0 to 1: the axis ends at 1).
        x_title: what the horizontal axis counts.
        log_y: logarithmic left axis.
        height: of the drawing area, pixels.
        label: what the chart shows, for screen readers.
        waiting: shown before the first point.
        static: draw for a file; by default decided by :func:`is_static`.

    Raises:
        ConfigError: an unknown option.

    Example:
        >>> plot = LivePlot(traces={"loss": {"smooth": 0.8}, "accuracy": {"axis": 2}})
        >>> plot.append("loss", 1, 2.3)
        >>> plot.append("loss", [2, 3], [2.1, 1.9])
    """

    _esm = module("plotting.js", "live_plot.js")
    _css = HERE / "live_plot.css"
    _options = traitlets.Dict().tag(sync=True)
    _timer: threading.Timer | None = None  # also of an instance that was never made whole: ipywidgets closes it too

    def __init__(
        self,
        traces: Mapping[str, Mapping[str, Any]],
        *,
        x_title: str = "step",
        log_y: bool = False,
        height: int = 260,
        label: str = "live chart",
        waiting: str = "waiting for the first reading…",
        static: bool | None = None,
    ) -> None:
        self._lines = {name: Line() for name in traces}
        self._changed: set[str] = set()
        self._last = 0.0
        options = {
            "traces": [_trace(name, given) for name, given in traces.items()],
            "x_title": x_title,
            "log_y": log_y,
            "height": height,
            "label": label,
            "waiting": waiting,
        }
        super().__init__(static=static, _options=options)

    def append(self, name: str, x: float | Iterable[float], y: float | Iterable[float | None]) -> None:
        """Add a point, or several, to the curve ``name``; drawn within a quarter of a second. None or NaN is a gap.

        Raises:
            ConfigError: there is no such curve.
        """
        if name not in self._lines:
            raise unknown("trace", name, self._lines)
        xs, ys = np.atleast_1d(np.asarray(x, dtype="f8")), np.atleast_1d(np.asarray(y, dtype="f8"))
        with self._lock:
            self._lines[name].extend(xs.tolist(), ys.tolist())
            self._changed.add(name)
        self._schedule()

    def clear(self, *names: str) -> None:
        """Forget the points of the curves ``names``, or of all."""
        with self._lock:
            for name in names or self._lines:
                self._lines[name].clear()
                self._changed.add(name)
        self._schedule()

    def redraw(self) -> None:
        """Send what is pending now."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().close()

    def arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the points that the curve ``name`` shows."""
        with self._lock:
            return self._lines[name].arrays()

    def _schedule(self) -> None:
        with self._lock:
            wait = self._last + PERIOD - time.monotonic()
            if wait <= 0:
                self._flush()
            elif self._timer is None:
                self._timer = threading.Timer(wait, self.redraw)
                self._timer.daemon = True
                self._timer.start()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last = time.monotonic()
        self._publish()

    def _changes(self, frame: Frame, whole: bool) -> None:
        for name in self._lines if whole else sorted(self._changed):
            self._lines[name].write(frame, name, whole)
        self._changed.clear()

    def _static_html(self) -> str:
        from widgets.svg import chart

        with self._lock:
            curves = {t["label"]: (*self._lines[t["name"]].arrays(), t["axis"]) for t in self._options["traces"]}
            return chart(curves, x_title=self._options["x_title"], log_y=self._options["log_y"], height=self._options["height"])


def _trace(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    for option in given:
        if option not in _TRACE:
            raise unknown("trace option", option, _TRACE)
    trace = {**_TRACE, "label": name, **given, "name": name}
    if not 0 <= trace["smooth"] < 1:
        raise ConfigError(f"smooth={trace['smooth']} of the trace {name!r} must lie in [0, 1).", "0.8 is gentle; 0 turns it off.")
    return trace
