"""The pruning panel: a trained run, a :class:`~workbench.PruneConfig`, and the smaller models made from it."""

from __future__ import annotations

from widgets.compress import CompressPanel, preamble
from workbench.compress.config import PruneConfig
from workbench.run import Run


class PrunePanel(CompressPanel):
    """Remove channels from a trained model, and see what that costs.

    Example:
        >>> PrunePanel(run, PruneConfig(ratio=0.5))
    """

    title = "Prune"
    verb = "prune"
    config_class = PruneConfig
    empty = "A pruned model appears here, beside the original."

    def _code_for(self, run: Run, config: PruneConfig, name: str) -> str:
        return preamble(run, "save_model", "PruneConfig", "prune") + (
            "model = run.load_model()\n"
            f"pruned = prune(model, {config.to_code()}, held_out[0])\n"
            f'folder = save_model(pruned, run.path / "variants" / {name!r})\n'
            'comparison = compare({"original": model, "pruned": pruned}, held_out, CompareConfig(compile=False, seconds=5))\n'
            'comparison.to_html(folder / "comparison.html")\n'
        )
