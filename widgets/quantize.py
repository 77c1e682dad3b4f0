"""The quantization panel: a trained run, a :class:`~workbench.QuantConfig`, and the INT8 models made from it."""

from __future__ import annotations

from widgets.action import ActionPanel, preamble
from workbench.compress.quantization_config import QuantConfig
from workbench.run import Run

CALIBRATION = 'calibration = load_batches(run.config.data, "train", root=run.path)\n'


class QuantizePanel(ActionPanel):
    """Store and multiply a trained model's numbers in INT8, and see what that costs.

    Example:
        >>> QuantizePanel(run, QuantConfig(mode="static"))
    """

    title = "Quantize"
    verb = "quantize"
    store = "variants"
    config_class = QuantConfig
    empty = "A quantized model appears here, beside the original."

    def _code_for(self, run: Run, config: QuantConfig, name: str) -> str:
        learned, names = config.mode == "qat", ["QuantConfig", "quantize", "save_model"]
        if learned:
            steps = (
                f"prepared = QuantAwareTraining(model, {config.to_code()}, held_out[0]).prepare()\n"
                'gently = {"epochs": max(1, run.config.epochs // 10), "optim.lr": run.config.optim.lr / 10}\n'
                "quantized = quantize(train(run.config.override(gently), model=prepared, root=run.path.parent).model)\n"
            )
        else:
            samples = ", calibration" if config.mode == "static" else ""
            steps = f"quantized = quantize(model, {config.to_code()}{samples})\n"
        return preamble(run, sorted([*names, *(["QuantAwareTraining", "train"] if learned else [])])) + (
            f"{CALIBRATION if config.mode == 'static' else ''}"
            "model = run.load_model()\n"
            f"{steps}"
            f'folder = save_model(quantized, run.path / "variants" / {name!r})\n'
            'comparison = compare({"original": model, "quantized": quantized}, held_out, CompareConfig(seconds=10))\n'
            'comparison.to_html(folder / "comparison.html")\n'
        )
