"""A panel: a form from a Config, a verb, a view of a run.

:class:`Panel` is a plain object that opens its widgets when first shown, so that a notebook run by papermill stores a small
summary and no widget at all. Whatever a button does is Python text: the panel shows it (:attr:`Panel.code`) and runs that very
text. Work is done on one thread a panel, in order; callbacks queue it and return, whichever thread they arrive on.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import ipywidgets

from widgets.code import CodeView
from widgets.live_plot import is_static
from widgets.markup import Html, tag
from workbench.run import Run, runs_folder

W = TypeVar("W", bound=ipywidgets.Widget)


class Panel:
    """Base of the panels.

    A panel implements ``_build`` (its widgets) and ``_summary`` (HTML for a notebook that is a file). ``close()`` closes both the
    widgets that ``_own`` was given and the threads.
    """

    title = ""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._owned: list[ipywidgets.Widget] = []
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._view: ipywidgets.Widget | None = None
        self._listeners: list[Callable[[Run], None]] = []
        self._code_view: CodeView | None = None

    # -- what a user meets -----------------------------------------------------------------------------------------

    @property
    def view(self) -> ipywidgets.Widget:
        """The panel's widget, built when first asked for."""
        with self._lock:
            if self._view is None:
                self._view = self._own(self._build())
            return self._view

    @property
    def code(self) -> str:
        """The Python that the panel's button runs."""
        return ""

    def on_run(self, listener: Callable[[Run], None]) -> None:
        """Call ``listener`` whenever the panel turns to another run."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Close the widgets and end the threads. Runs go on: they live in processes of their own."""
        self._closed.set()
        self._queue.put(None)
        with self._lock:
            owned, self._owned = self._owned, []
        for widget in reversed(owned):
            close_tree(widget)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        summary = str(tag("div", self._summary(), style="font-size:13px;line-height:20px"))
        if is_static() or self._closed.is_set():
            return {"text/plain": repr(self), "text/html": summary}, {}
        bundle = self.view._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self), "text/html": summary}, metadata

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # -- for the panels --------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        raise NotImplementedError(f"{type(self).__name__} must say what it is built of.")

    def _summary(self) -> Html:
        return tag("b", self.title) + tag("pre", self.code)

    def _turned(self, run: Run) -> None:
        for listener in self._listeners:
            listener(run)

    def _own(self, widget: W) -> W:
        with self._lock:
            self._owned.append(widget)
        return widget

    def _frame(self, *children: ipywidgets.Widget) -> ipywidgets.Box:
        return box("wb-panel", children)

    def _code(self, title: str) -> CodeView:
        self._code_view = CodeView(self.code, title)
        return self._code_view

    def _show_code(self, code: str = "", title: str = "The button runs this code") -> None:
        if self._code_view is not None:
            self._code_view.code, self._code_view.title = code or self.code, title

    def _do(self, work: Callable[[], Any], on_error: Callable[[BaseException], None]) -> None:
        """Queue ``work`` for the panel's thread and return. What it raises goes to ``on_error``."""

        def job() -> None:
            try:
                work()
            except Exception as error:
                on_error(error)

        with self._lock:
            if self._closed.is_set():
                return
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"{type(self).__name__}-worker", daemon=True)
                self._worker.start()
        self._queue.put(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None and not self._closed.is_set():
            job()


def open_code(run: Run) -> str:
    """The expression that opens ``run``: by name where it lies under the runs' folder, else by path."""
    name = run.id if run.path.parent == runs_folder() else str(run.path)
    return f"Run.open({name!r})"


def newest() -> list[Run]:
    """Every run, the newest first, those of one second in their order too."""
    return sorted(Run.all(), key=lambda run: (run.path / "config.yaml").stat().st_mtime_ns, reverse=True)


def box(classes: str, children: Iterable[ipywidgets.Widget] = ()) -> ipywidgets.Box:
    """A container laid out by the theme's style sheets."""
    container = ipywidgets.Box(list(children))
    for name in ("wb", *classes.split()):
        container.add_class(name)
    return container


def close_tree(widget: ipywidgets.Widget) -> None:
    """Close a widget, what it contains, and their layouts: ipywidgets keeps each until it is closed."""
    for child in getattr(widget, "children", ()):
        close_tree(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if isinstance(part, ipywidgets.Widget):
            with contextlib.suppress(Exception):
                part.close()
