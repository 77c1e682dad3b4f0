"""All panels as one: train, inspect, explain, prune, quantize, compare, and the runs they share.

A run chosen in one panel is the current run of the others. Panels are made when first turned to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets

from widgets import theme
from widgets.markup import Html, button, tag
from widgets.panel import Panel, box
from widgets.surface import Surface
from workbench.run import Run
from workbench.training.config import TrainConfig

TABS = ("Train", "Inspect", "Explain", "Prune", "Quantize", "Compare", "Runs")


class Workbench(Panel):
    """The whole workbench in one cell.

    Args:
        config: what the training form starts from.
        run: the current run; by default the one that :class:`~widgets.TrainPanel` finds.

    Example:
        >>> Workbench()
    """

    title = "Workbench"

    def __init__(self, config: TrainConfig | None = None, run: Run | None = None) -> None:
        super().__init__()
        from widgets.train import TrainPanel

        self.tab = "Train"
        self.train = TrainPanel(config, run)
        self.train.on_run(self._select)
        self.panels: dict[str, Any] = {"Train": self.train}
        self.run: Run | None = self.train.run

    @property
    def code(self) -> str:
        panel = self.panels.get(self.tab)
        return str(getattr(panel, "code", ""))

    def open(self, tab: str) -> Any:
        """Turn to a panel; the panel, None when it needs a run and there is none."""
        with self._lock:
            self.tab = tab
            panel = self.panels.get(tab) or self._make(tab)
            if panel is not None and self.run is not None and tab != "Runs" and not _same(panel.run, self.run):
                (panel.open if tab == "Inspect" else panel.attach)(self.run)
            if self._view is not None:
                self._page.children = [_view(panel) if panel is not None else self._nothing]
                self._nav.html = self._nav_html()
        return panel

    def select(self, run: Run) -> None:
        """Make ``run`` the current run of every panel."""
        self._select(run)
        self.open(self.tab)

    def close(self) -> None:
        for panel in self.panels.values():
            panel.close()
        super().close()

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        self._nav = Surface(on={"tab": self._turn})
        self._nothing = self._own(Surface(theme.empty("No run yet.", "Start one under Train.")))
        self._page = box("wb-page", [_view(self.panels["Train"])])
        frame = box("wb-workbench", [self._nav, self._page])
        self._nav.html = self._nav_html()
        return frame

    def _summary(self) -> Html:
        return self.train._summary()

    def _nav_html(self) -> Html:
        tabs = [
            button(
                name,
                "tab",
                value=name,
                role="tab",
                aria_selected=str(name == self.tab).lower(),
                tabindex=0 if name == self.tab else -1,
            )
            for name in TABS
        ]
        current = tag("span", self.run.id, cls="mono quiet nowrap", title=str(self.run.path)) if self.run is not None else None
        return tag("nav", tag("div", tabs, role="tablist", aria_label="Workbench"), current, cls="wb-nav")

    def _turn(self, value: Any, _values: Mapping[str, Any]) -> None:
        if value in TABS:
            self._do(lambda: self.open(str(value)), self._failed)

    def _failed(self, error: BaseException) -> None:
        surface = self._own(Surface(theme.error_notice(error)))
        self._page.children = [surface]
        self._nav.html = self._nav_html()

    # -- panels ----------------------------------------------------------------------------------------------------

    def _make(self, tab: str) -> Any:
        if tab == "Inspect" and self.run is None:
            return None
        panel = self.panels[tab] = _makers(self._reopen)[tab](self.run)
        if isinstance(panel, Panel):
            panel.on_run(self._select)
        if hasattr(panel, "on_tune"):
            panel.on_tune(self._tune)
        return panel

    def _select(self, run: Run) -> None:
        self.run = run
        if self._view is not None:
            self._nav.html = self._nav_html()

    def _reopen(self, run: Run) -> None:
        """A run from the list: followed, and its config in the form, so that Start repeats it."""
        self._select(run)
        self.train.config = run.config
        self.open("Train")

    def _tune(self, folder: Path) -> None:
        """Train a variant further: the training form, filled in with its run's config and the variant as the model."""

        def work() -> None:
            assert self.run is not None
            config = self.run.config.override({"model.name": str(folder), "model.args": {}, "label": f"{folder.name}-tuned"})
            self.train.config = config
            self.open("Train")

        self._do(work, self._failed)


def _makers(reopen: Callable[[Run], None]) -> dict[str, Callable[[Run | None], Any]]:
    from widgets.compare import ComparePanel
    from widgets.explain import Explain
    from widgets.inspector import Inspector
    from widgets.prune import PrunePanel
    from widgets.quantize import QuantizePanel
    from widgets.runs import RunList

    made: dict[str, Callable[[Run | None], Any]] = {"Inspect": Inspector, "Explain": Explain, "Prune": PrunePanel}
    return made | {"Quantize": QuantizePanel, "Compare": ComparePanel, "Runs": lambda run: RunList(on_open=reopen)}


def _same(one: Run | None, other: Run | None) -> bool:
    return one is not None and other is not None and one.path == other.path


def _view(panel: Any) -> ipywidgets.Widget:
    """A panel's widget; a panel that is a widget is its own."""
    return panel if isinstance(panel, ipywidgets.Widget) else panel.view
