"""The Inspector: one widget that shows a run while it trains, or long after.

:class:`Inspector` follows the run's folder (:class:`widgets.follow.Follower`) and sends the page what is new, at most four times
a second. It holds nothing that is not in the folder: a new page, another tab or a restarted kernel gets the whole history.
Where no page listens (papermill, nbconvert, nbval) it is a small static drawing; see :func:`widgets.live_plot.is_static`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from widgets import theme
from widgets.follow import Follower
from widgets.frames import Frame
from widgets.inspector import figures
from widgets.inspector.recording import Recording
from widgets.inspector.snapshots import SnapshotView
from widgets.live_plot import LiveWidget, module
from workbench import diagnosis, events
from workbench.run import TERMINAL, Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

DIAGNOSE_EVERY = 5.0
"""Seconds between two looks of the diagnosis."""


class Inspector(LiveWidget):
    """Loss and metrics, gradient norms by layer, activation distributions, memory and step time by rank, findings: live.

    Args:
        run_or_path: a :class:`workbench.Run`, its folder or its name; None to open one later.
        refresh: seconds between two updates, at least 0.25.
        static: draw for a file; by default decided by :func:`widgets.live_plot.is_static`.

    Raises:
        RunError: there is no such run.

    Example:
        >>> inspector = Inspector(launch(config))
        >>> inspector                                # in a notebook: the live view
        >>> inspector.figures()["gradients"].show()  # plotly figures of the same, for code and papers
        >>> inspector.open(another_run)
    """

    _esm = module("plotting.js", "inspector/parts.js", "inspector/inspector.js", "inspector/memory.js", "inspector/charts.js")
    _css = theme.css("inspector/inspector.css", "inspector/memory.css")
    _follower: Follower | None = None  # also of an instance that was never made whole: ipywidgets closes it too

    def __init__(
        self, run_or_path: Run | str | os.PathLike[str] | None = None, refresh: float = 0.25, *, static: bool | None = None
    ) -> None:
        self.refresh = max(0.25, refresh)
        self.run: Run | None = None
        self.recording: Recording | None = None
        self._findings: list[events.Finding] = []
        self._problem = ""
        self._snapshots = SnapshotView()
        self._last_look = self._last_diagnosis = 0.0
        super().__init__(static=static)
        if run_or_path is not None:
            self.open(run_or_path)

    def open(self, run_or_path: Run | str | os.PathLike[str] | None = None) -> None:
        """Turn to a run. Without one, open the connection to the page, as widgets do when they are made."""
        if run_or_path is None:
            super().open()
            return
        run = run_or_path if isinstance(run_or_path, Run) else Run.open(run_or_path)
        with self._lock:
            self._stop_following()
            self.run, self.recording = run, Recording(run)
            self._findings, self._problem, self._snapshots = [], "", SnapshotView()
            self._last_look = self._last_diagnosis = 0.0
            if self.static:
                return
            self._publish(whole=True)
            self._follow()

    def close(self) -> None:
        """Stop following and close the view; the run goes on."""
        self._stop_following()
        super().close()

    @property
    def following(self) -> bool:
        """Whether a thread follows the run: it does until the run ends or :meth:`close`."""
        return self._follower is not None and self._follower.alive

    @property
    def findings(self) -> list[events.Finding]:
        """What the run reported and what its readings show now, worst first."""
        self._catch_up()
        return list(self._findings)

    def figures(self) -> dict[str, go.Figure]:
        """Plotly figures by name, of what has readings: ``loss``, ``gradients``, ``activations``, ``memory``, ``memory_layers``,
        ``communication``."""
        with self._lock:
            recording = self._catch_up()
            return figures.plotly_figures(recording) if recording else {}

    # -- following ----------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        assert self.run is not None and self.recording is not None
        recording = self.recording  # bound to the callbacks, so that a thread that is ending cannot write into the next run's
        self._follower = Follower(
            self.run,
            lambda fresh, anew: self._on_events(recording, fresh, anew),
            lambda status: self._on_look(recording, status),
        ).start()

    def _stop_following(self) -> None:
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    def _on_events(self, recording: Recording, fresh: Sequence[events.Event], anew: bool) -> None:
        with self._lock:
            recording.take_events(fresh, anew)

    def _on_look(self, recording: Recording, status: str) -> None:
        ended = status in TERMINAL
        if not ended and time.monotonic() - self._last_look < self.refresh:
            return
        self._last_look = time.monotonic()
        more = True
        while more and recording is self.recording:
            with self._lock:
                try:
                    more = recording.read(last=ended)
                    if not more and (ended or time.monotonic() - self._last_diagnosis > DIAGNOSE_EVERY):
                        self._diagnose()
                except Exception as error:
                    self._problem = f"The Inspector stopped following this run: {error}"
                    self._publish()
                    raise
                self._publish()

    def _diagnose(self) -> None:
        """Findings that the run reported, and those of its readings now; one of a name."""
        assert self.run is not None and self.recording is not None
        tables = {kind: self.recording.frame_of(kind) for kind in ("gradients", "activations", "communication")}
        now = diagnosis.diagnose(self.run.history, **tables)
        reported = {finding.name: finding for finding in self.run.findings}
        found = [*now, *(f for name, f in reported.items() if name not in {n.name for n in now})]
        self._findings = sorted(found, key=lambda f: diagnosis.SEVERITIES.index(f.severity))
        self._last_diagnosis = time.monotonic()

    def _catch_up(self) -> Recording | None:
        """Where nothing follows the run (a static or a closed view) read to the end of what there is."""
        with self._lock:
            if self.run is None or self.comm is not None:
                return self.recording
            recording = self.recording = Recording(self.run, self.recording.rank if self.recording else None)
            recording.take_events(self.run.events, anew=True)
            while recording.read(last=True):
                pass
            self._diagnose()
            return recording

    # -- the page -----------------------------------------------------------------------------------------------------

    def _changes(self, frame: Frame, whole: bool) -> None:
        if self.run is None or self.recording is None:
            frame.add("fact", "header", value=None)
            return
        self.recording.write(frame, whole)
        self.recording.fact(frame, "header", self._header(self.run, self.recording))
        told = {"severity", "message", "layer", "step", "name"}
        rows = [{**finding.model_dump(include=told), "remedy": remedy_text(finding)} for finding in self._findings]
        self.recording.fact(frame, "findings", rows)
        for name, value in self._snapshots.facts(self.run).items():
            self.recording.fact(frame, name, value)

    def _header(self, run: Run, recording: Recording) -> dict[str, Any]:
        progress, started = run.progress, recording.started
        facts = []
        if started is not None:
            ranks = f"{started.world_size} ranks" if started.world_size > 1 else ""
            facts = [started.device, ranks, f"{_compact(started.parameters)} parameters"]
        rate = progress.samples_per_s
        return {
            "name": run.id,
            "status": run.status,
            "facts": " · ".join(filter(None, facts)),
            "step": progress.step,
            "total": progress.total_steps,
            "epoch": progress.epoch,
            "rate": None if rate is None else float(f"{rate:.4g}"),
            "left": None if progress.eta is None or run.status != "running" else theme.duration(progress.eta),
            "ranks": recording.world_size,
            "problem": self._problem,
        }

    def _on_page(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        if content.get("kind") == "hello" and self.run is not None and not self.following and self.run.status not in TERMINAL:
            self.open(self.run)  # it was resumed since its end was shown
        else:
            super()._on_page(widget, content, buffers)

    def _on_request(self, content: Mapping[str, Any]) -> None:
        kind, value = content.get("kind"), content.get("value")
        with self._lock:
            recording = self.recording
            if recording is None:
                return
            if kind == "layer":
                known = {*recording.layers("gradients"), *recording.layers("activations")}
                recording.choose_layer(value if value in known else None)
            elif kind == "time":
                recording.choose_time(value if isinstance(value, int) and value >= 0 else None)
            elif kind in ("snapshot", "open_snapshot") and self.run is not None:
                self._snapshots.request(self.run, kind, value)
            elif kind == "rank" and (value is None or isinstance(value, int)) and value != recording.rank:
                recording.rank = value
                recording.reset_readings()
                while recording.read(last=not self.following):
                    pass
                recording.choose_layer(recording.layer)
                self._publish(whole=True)
                return
            self._publish()

    def _static_html(self) -> str:
        with self._lock:
            recording = self._catch_up()
            if recording is None or self.run is None:
                return figures.empty_html()
            rows = [(f.severity, f.message, remedy_text(f)) for f in self._findings]
            return figures.static_html(recording, self._header(self.run, recording), rows)


def remedy_text(finding: events.Finding) -> str:
    """The remedy as overrides a person can paste: ``optim.lr=0.001 clip.mode=dynamic``."""
    return " ".join(f"{name}={value}" for name, value in finding.remedy.items())


def _compact(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
