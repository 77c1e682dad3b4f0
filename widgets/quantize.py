"""The quantization panel: a trained run, a :class:`~workbench.QuantConfig`, and the INT8 models made from it."""

from __future__ import annotations

from widgets.compress import CompressPanel, preamble
from workbench.compress.config import QuantConfig
from workbench.run import Run


class QuantizePanel(CompressPanel):
    """Store and multiply a trained model's numbers in INT8, and see what that costs.

    Example:
        >>> QuantizePanel(run, QuantConfig(mode="static"))
    """

    title = "Quantize"
    verb = "quantize"
    config_class = QuantConfig
    tunable = False
    empty = "A quantized model appears here, beside the original."

    def _code_for(self, run: Run, config: QuantConfig, name: str) -> str:
        calibrated = config.mode == "static"
        data = (
            "calibration = [batch for _, step in zip(range(8), batches.epoch(0)) for batch in step]  # training samples\n"
            if calibrated
            else ""
        )
        return preamble(run, "save_model", "QuantConfig", "quantize") + (
            f"{data}model = run.load_model()\n"
            f"quantized = quantize(model, {config.to_code()}{', calibration' if calibrated else ''})\n"
            f'folder = save_model(quantized, run.path / "variants" / {name!r})\n'
            'comparison = compare({"original": model, "quantized": quantized}, held_out, CompareConfig(seconds=10))\n'
            'comparison.to_html(folder / "comparison.html")\n'
        )
