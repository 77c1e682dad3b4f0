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
        static = config.mode == "static"
        return preamble(run, ("QuantConfig", "quantize", "save_model")) + (
            f"{CALIBRATION if static else ''}"
            "model = run.load_model()\n"
            f"quantized = quantize(model, {config.to_code()}{', calibration' if static else ''})\n"
            f'folder = save_model(quantized, run.path / "variants" / {name!r})\n'
            "measure = CompareConfig(seconds=10, attributions=0)\n"
            'comparison = compare({"original": model, "quantized": quantized}, held_out, measure)\n'
            'comparison.to_html(folder / "comparison.html")\n'
        )
