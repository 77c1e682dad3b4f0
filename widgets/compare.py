"""The comparison panel: a run's model, its variants and other runs, measured side by side on the run's held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from widgets.action import ActionPanel, head_of, preamble, section, trained
from widgets.job import Job
from widgets.markup import Html, button, tag
from workbench.comparison import CompareConfig, Comparison
from workbench.run import Run

REPORT, TABLE = "comparison.html", "comparison.csv"
CANDIDATES = 50
"""Most variants and runs offered."""


class ComparePanel(ActionPanel):
    """Choose variants, measure them in turns, and read what got worse: table, frontier, classes and attributions.

    Args:
        run: the run whose data to measure on, and whose model comes first; by default the newest that has one.
        chosen: folders of the variants and runs to compare it with; by default all its variants.
        config: how to measure.

    Example:
        >>> ComparePanel(run)
    """

    title = "Compare"
    verb = "compare"
    store = "comparisons"
    config_class = CompareConfig
    empty = "Accuracy, size and latency appear here, side by side."
    source_label = "original, and its held-out data"
    wide = True

    def __init__(
        self, run: Run | None = None, chosen: Iterable[Path | str] | None = None, config: CompareConfig | None = None
    ) -> None:
        super().__init__(run, config)
        self._chosen: set[str] | None = {str(path) for path in chosen} if chosen is not None else None

    @property
    def candidates(self) -> dict[str, Path]:
        """What can be compared with the run's own model, by name: its variants, then other trained runs."""
        if self.run is None:
            return {}
        own = {path.parent.name: path.parent for path in sorted((self.run.path / "variants").glob("*/structure.json"))}
        return own | {run.id: run.path for run in trained() if run.path != self.run.path}

    @property
    def chosen(self) -> dict[str, Path]:
        """The candidates that are ticked."""
        own = self.run.path / "variants" if self.run is not None else None
        ticked = self._chosen
        return {name: p for name, p in self.candidates.items() if (str(p) in ticked if ticked is not None else p.parent == own)}

    def attach(self, run: Run) -> None:
        self._chosen = None
        super().attach(run)

    def _code_for(self, run: Run, config: CompareConfig, name: str) -> str:
        lines = []
        for label, path in self.chosen.items():
            inside = path.is_relative_to(run.path)
            where = f"run.path / {str(path.relative_to(run.path))!r}" if inside else repr(str(path))
            lines.append(f"    {label!r}: {where},\n")
        return preamble(run, ()) + (
            f'variants = {{\n    "original": run,\n{"".join(lines)}}}\n'
            f"comparison = compare(variants, held_out, {config.to_code()})\n"
            f'comparison.to_html(run.path / "comparisons" / {name!r} / "{REPORT}")\n'
            f'comparison.to_csv(run.path / "comparisons" / {name!r} / "{TABLE}")\n'
        )

    def _handlers(self) -> dict[str, Any]:
        return super()._handlers() | {"tick": self._tick, "report": self._report}

    def _choices(self) -> Html:
        chosen = self.chosen
        boxes = []
        for name, path in list(self.candidates.items())[:CANDIDATES]:
            box = tag("input", type="checkbox", data_action="tick", data_value=str(path), checked=name in chosen)
            label = tag("span", name, cls="mono nowrap", title=str(path))
            boxes.append(tag("label", box, label, cls="row wb-tick", data_key=str(path)))
        return tag("div", boxes, cls="wb-ticks", role="group", aria_label="Compare with")

    def _results_html(self) -> list[Html]:
        return [self._section(job) for job in self.jobs[:1]]

    def _section(self, job: Job) -> Html:
        kept = job.result.get("comparison")
        if kept is None:
            return section(job, self._action(job))
        # What the template writes is escaped there, for notebooks and pages alike.
        return tag("section", head_of(job, self._action(job)), Html(Comparison.from_json(kept)._repr_html_()), cls="stack")

    def _action(self, job: Job) -> Html | None:
        if (job.folder / REPORT).exists():
            return button("Open the report", "report", value=job.folder.name)
        return super()._action(job)

    def _tick(self, value: Any, _values: Mapping[str, Any]) -> None:
        self._chosen = {str(path) for path in self.chosen.values()} ^ {str(value)}
        self._refresh()

    def _report(self, value: Any, _values: Mapping[str, Any]) -> None:
        if (job := self._job(value)) is not None:
            page = job.folder / REPORT
            self._do(lambda: self._results.show_page(page.read_text(encoding="utf-8")), lambda error: None)
