"""The Inspector: one widget that shows a run while it trains, or long after.

:class:`Inspector` follows the run's folder (:class:`widgets.follow.Follower`) and sends the page what is new, at most four times
a second; with a second run beside it, that run's too. It holds nothing that is not in the folders: a new page, another tab or a
restarted kernel gets the whole history. :meth:`Inspector.export` writes the page as a file (:mod:`widgets.inspector.export`).
Where no page listens (papermill, nbconvert, nbval) it is a small static drawing; see :func:`widgets.live_plot.is_static`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widgets import theme
from widgets.follow import Follower
from widgets.frames import Frame
from widgets.inspector import export, figures
from widgets.inspector.beside import differences, neighbours
from widgets.inspector.findings import Findings
from widgets.inspector.quantities import QUANTITIES
from widgets.inspector.recording import Recording
from widgets.inspector.snapshots import SnapshotView
from widgets.live_plot import LiveWidget, module
from workbench import events, remedies, storage
from workbench.errors import RunError
from workbench.run import TERMINAL, Run, runs_folder

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Inspector(LiveWidget):
    """Loss and metrics, gradient norms by layer, activation distributions, memory and step time by rank, findings: live.

    Args:
        run_or_path: a :class:`workbench.Run`, its folder or its name; None to open one later.
        refresh: seconds between two updates, at least 0.25.
        beside: a second run to compare with, given alike.
        static: draw for a file; by default decided by :func:`widgets.live_plot.is_static`.

    Raises:
        RunError: there is no such run.

    Example:
        >>> inspector = Inspector(launch(config))
        >>> inspector                                # in a notebook: the live view
        >>> inspector.figures()["gradients"].show()  # plotly figures of the same, for code and papers
        >>> inspector.open(another_run)
        >>> inspector.beside(yet_another)            # compare: curves overlaid, heat maps as a ratio, settings that differ
        >>> inspector.export("run.html")             # the page as one file, which needs neither network nor kernel
    """

    _esm = module(*export.SCRIPTS, "inspector/widget.js")
    _css = theme.css("inspector/inspector.css", "inspector/memory.css")
    _followers: dict[Recording, Follower] | None = None  # also of an instance that was never made whole: ipywidgets closes it too

    def __init__(
        self,
        run_or_path: Run | str | os.PathLike[str] | None = None,
        refresh: float = 0.25,
        *,
        beside: Run | str | os.PathLike[str] | None = None,
        static: bool | None = None,
    ) -> None:
        self.refresh = max(0.25, refresh)
        self.run: Run | None = None
        self.recording: Recording | None = None
        self._findings = Findings()
        self._applied: dict[str, str] = {}
        self._problem = ""
        self._snapshots = SnapshotView()
        self._other: Recording | None = None
        self._differences: list[tuple[str, str, str]] = []
        self._followers = {}
        super().__init__(static=static)
        if run_or_path is not None:
            self.open(run_or_path)
            if beside is not None:
                self.beside(beside)

    def open(self, run_or_path: Run | str | os.PathLike[str] | None = None) -> None:
        """Turn to a run. Without one, open the connection to the page, as widgets do when they are made."""
        if run_or_path is None:
            super().open()
            return
        run = _run(run_or_path)
        with self._lock:
            self._stop_following()
            self.run, self.recording, self._other, self._differences = run, Recording(run), None, []
            self._findings, self._applied, self._problem = Findings(), {}, ""
            self._snapshots = SnapshotView()
            if not self.static:
                self._publish(whole=True)
                self._follow(self.recording)

    def beside(self, run_or_path: Run | str | os.PathLike[str] | None) -> None:
        """Compare with another run; None ends it.

        Raises:
            RunError: there is no such run, or none is open to compare with it.
        """
        other = None if run_or_path is None else _run(run_or_path)
        with self._lock:
            if self.run is None or self.recording is None:
                raise RunError("No run is open to compare with.", "Open one first: inspector.open(run).")
            if self._other is not None:
                self._stop_following(self._other)
            self._other = None if other is None else _like(self.recording, Recording(other))
            self._differences = [] if other is None else differences(self.run, other)
            if not self.static:
                self._publish(whole=True)
                if self._other is not None:
                    self._follow(self._other)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the page as one HTML file: the whole history, to be scrubbed and clicked through without network or kernel.

        At most 6 MB: the heat maps of a long run of many layers lose every other column until they fit. Returns the path.

        Raises:
            RunError: no run is open.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(target, self._exported())
        return target

    def _exported(self) -> bytes:
        with self._lock:
            recording = self._catch_up()
            if recording is None or self.run is None:
                raise RunError("No run is open to export.", "Open one first: inspector.open(run).")
            recordings = {"": recording} | ({"beside": self._other} if self._other else {})
            return export.page(self.run.id, recordings, self._words(recording, self._other))

    def close(self) -> None:
        """Stop following and close the view; the run goes on."""
        self._stop_following()
        super().close()

    @property
    def following(self) -> bool:
        """Whether a thread follows the run: it does until the run ends or :meth:`close`."""
        return any(follower.alive for follower in (self._followers or {}).values())

    @property
    def findings(self) -> list[events.Finding]:
        """What the run reported and what its readings show now, worst first."""
        self._catch_up()
        return list(self._findings.rows)

    def figures(self) -> dict[str, go.Figure]:
        """Plotly figures by name, of what has readings: ``loss``, ``gradients``, ``gradients:QUANTITY``, ``activations``,
        ``memory``, ``memory_layers``, ``throughput``, ``communication``."""
        with self._lock:
            recording = self._catch_up()
            return figures.plotly_figures(recording) if recording else {}

    # -- following ----------------------------------------------------------------------------------------------------

    def _follow(self, recording: Recording) -> None:
        assert self._followers is not None
        # Bound to the recording, so that a thread that is ending cannot write into the next one's.
        self._followers[recording] = Follower(
            recording.run,
            lambda fresh, anew: self._on_events(recording, fresh, anew),
            lambda status: self._on_look(recording, status),
            self.refresh,
        ).start()

    def _stop_following(self, *recordings: Recording) -> None:
        followers = self._followers or {}
        for recording in recordings or tuple(followers):
            if recording in followers:
                followers.pop(recording).close()

    def _on_events(self, recording: Recording, fresh: Sequence[events.Event], anew: bool) -> None:
        with self._lock:
            recording.take_events(fresh, anew)

    def _on_look(self, recording: Recording, status: str) -> None:
        ended, more = status in TERMINAL, True
        while more and (recording is self.recording or recording is self._other):
            with self._lock:
                try:
                    more = recording.read(last=ended)
                    if not more and recording is self.recording:
                        if ended:
                            self._findings.look(recording)
                        else:
                            self._findings.look_apart(recording, self._lock, self._publish, self._say_stopped)
                except Exception as error:
                    self._say_stopped(error)
                    raise
                self._publish()

    def _say_stopped(self, error: Exception) -> None:
        self._problem = f"The Inspector stopped following this run: {error}"
        self._publish()

    def _catch_up(self) -> Recording | None:
        """Where nothing follows the run (a static or a closed view) read to the end of what there is."""
        with self._lock:
            if self.run is None or self.comm is not None:
                return self.recording
            assert self.recording is not None
            self.recording = _read_to_the_end(_like(self.recording, Recording(self.run, self.recording.rank)))
            self._other = self._other and _read_to_the_end(_like(self._other, Recording(self._other.run)))
            self._findings.look(self.recording)
            return self.recording

    # -- the page -----------------------------------------------------------------------------------------------------

    def _changes(self, frame: Frame, whole: bool) -> None:
        if self.run is None or self.recording is None:
            frame.add("fact", "header", value=None)
            return
        self.recording.write(frame, whole)
        if self._other is not None:
            mark = len(frame.operations)
            self._other.write(frame, whole)
            for operation in frame.operations[mark:]:
                operation["run"] = "beside"
        for name, value in self._words(self.recording, self._other).items():
            self.recording.fact(frame, name, value)

    def _words(self, recording: Recording, other: Recording | None) -> dict[str, Any]:
        """What the page says in words, by the name of the fact."""
        told = {"severity", "message", "layer", "step", "name"}
        return {
            "header": self._header(recording.run, recording),
            "findings": [
                {
                    **finding.model_dump(include=told),
                    "remedies": [
                        {
                            "key": (key := f"{finding.name}:{number}"),
                            "text": remedy_text(remedy),
                            "code": remedy_code(recording.run, remedy),
                            "applied": self._applied.get(key, ""),
                        }
                        for number, remedy in enumerate(finding.remedies)
                    ],
                }
                for finding in self._findings.rows
            ],
            "beside": None if other is None else self._header(other.run, other),
            "differences": self._differences,
            **self._snapshots.facts(recording.run),
        }

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
            if recording is None or self.run is None:
                return
            shown = [r for r in (recording, self._other) if r is not None]
            if kind == "layer":
                for one in shown:
                    one.choose_layer(value if value in {*one.layers("gradients"), *one.layers("activations")} else None)
            elif kind == "time":
                for one in shown:
                    one.choose_step(value if isinstance(value, int) and value >= 0 else None)
            elif kind == "quantity" and value in {quantity.name for quantity in QUANTITIES}:
                for one in shown:
                    one.choose_quantity(value)
            elif kind == "runs":
                self.send({"kind": "runs", "runs": neighbours(self.run)})
            elif kind == "beside" and (value is None or value in neighbours(self.run)):
                self.beside(None if value is None else self.run.path.parent / value)
                return
            elif kind == "export":
                self.send({"kind": "file", "name": f"{self.run.id}.html"}, [self._exported()])
            elif kind == "apply" and isinstance(value, str):
                self._apply(value)
            elif kind in ("snapshot", "open_snapshot"):
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

    def _apply(self, key: str) -> None:
        """Apply one of a finding's remedies from a thread: starting a run takes seconds, and a callback posts and returns."""
        offered = {
            f"{finding.name}:{number}": finding.model_copy(update={"remedy": remedy})
            for finding in self._findings.rows
            for number, remedy in enumerate(finding.remedies)
        }
        if key not in offered or self.run is None or key in self._applied:
            return
        self._applied[key] = "applying …"
        threading.Thread(target=self._carry_out, args=(self.run, key, offered[key]), name="apply", daemon=True).start()

    def _carry_out(self, run: Run, key: str, finding: events.Finding) -> None:
        try:
            words = remedies.apply(run, finding).words
        except Exception as error:
            words = str(error)
        with self._lock:
            if run is self.run:
                self._applied[key] = words
                self._publish()

    def _static_html(self) -> str:
        with self._lock:
            recording = self._catch_up()
            if recording is None or self.run is None:
                return figures.empty_html()
            rows = [(f.severity, f.message, remedy_text(f.remedy)) for f in self._findings.rows]
            return figures.static_html(recording, self._header(self.run, recording), rows)


def remedy_text(remedy: Mapping[str, Any]) -> str:
    """Overrides as a person can paste them: ``optim.lr=0.001 clip.mode=dynamic``."""
    return " ".join(f"{name}={value}" for name, value in remedy.items())


def remedy_code(run: Run, remedy: Mapping[str, Any]) -> str:
    """What the Apply button runs."""
    name = run.id if run.path.parent == runs_folder() else str(run.path)
    return f"from workbench import Run, apply\n\nprint(apply(Run.open({name!r}), {dict(remedy)!r}))\n"


def _run(run_or_path: Run | str | os.PathLike[str]) -> Run:
    return run_or_path if isinstance(run_or_path, Run) else Run.open(run_or_path)


def _like(chosen: Recording, recording: Recording) -> Recording:
    """``recording`` with the layer, the quantity and the step that another shows."""
    recording.layer, recording.quantity, recording.step = chosen.layer, chosen.quantity, chosen.step
    return recording


def _read_to_the_end(recording: Recording) -> Recording:
    recording.take_events(recording.run.events, anew=True)
    while recording.read(last=True):
        pass
    return recording


def _compact(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
