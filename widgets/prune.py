"""The pruning panel: a trained run, a :class:`~workbench.PruneConfig`, and the smaller models made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from widgets.action import ActionPanel, preamble
from widgets.job import Job
from widgets.markup import Html, button
from workbench.compress.pruning_config import PruneConfig
from workbench.run import Run


class PrunePanel(ActionPanel):
    """Remove channels from a trained model, and see what that costs.

    Example:
        >>> PrunePanel(run, PruneConfig(ratio=0.5))
    """

    title = "Prune"
    verb = "prune"
    store = "variants"
    config_class = PruneConfig
    empty = "A pruned model appears here, beside the original."

    def __init__(self, run: Run | None = None, config: PruneConfig | None = None) -> None:
        super().__init__(run, config)
        self._on_tune: Callable[[Path], None] | None = None

    def on_tune(self, listener: Callable[[Path], None]) -> None:
        """Offer to train a pruned model further: ``listener`` is given its folder."""
        self._on_tune = listener

    def _code_for(self, run: Run, config: PruneConfig, name: str) -> str:
        looks = config.looks_at_data
        return preamble(run, ("PruneConfig", "prune", "save_model")) + (
            "model = run.load_model()\n"
            + ('training = load_batches(run.config.data, "train", root=run.path)\n' if looks else "")
            + f"pruned = prune(model, {config.to_code()}, held_out[0]{', training' if looks else ''})\n"
            f'folder = save_model(pruned, run.path / "variants" / {name!r})\n'
            "measure = CompareConfig(compile=False, seconds=5, attributions=0)\n"
            'comparison = compare({"original": model, "pruned": pruned}, held_out, measure)\n'
            'comparison.to_html(folder / "comparison.html")\n'
        )

    def _handlers(self) -> dict[str, Any]:
        return super()._handlers() | {"tune": self._tune}

    def _action(self, job: Job) -> Html | None:
        if self._on_tune is not None and job.status == "finished":
            return button("Fine-tune", "tune", value=job.folder.name, title="Train this model further")
        return super()._action(job)

    def _tune(self, value: Any, _values: Mapping[str, Any]) -> None:
        if self._on_tune is not None and (job := self._job(value)) is not None:
            self._on_tune(job.folder)
