"""Mixed precision: which layers INT8 hurts, and the fewest to leave in floating point so that accuracy holds.

* :func:`layer_sensitivity` — one row a layer: what quantizing it alone costs.
* :func:`mixed_precision` — a quantized model that loses no more than allowed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.compress.graph import check_unquantized, layer_of
from workbench.compress.quantization import as_batches, calibrated, calibration_batches, quantize
from workbench.compress.quantization_config import QuantConfig
from workbench.compress.sample import try_out
from workbench.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    import pandas as pd

SCORED = 2048
"""Samples, at most, that a layer's cost is measured on."""


def layer_sensitivity(model: nn.Module, config: QuantConfig | None = None, data: Any = None) -> pd.DataFrame:
    """What rounding each layer's weight and input to INT8 costs, the others staying as they are.

    Args:
        model: as for :func:`~workbench.compress.quantization.quantize`.
        config: static; its ``keep_float`` layers aren't tried.
        data: samples to calibrate on, and to measure on: with labels, accuracy is measured too.

    Returns:
        Columns ``layer``, ``divergence`` (mean Kullback–Leibler divergence of the classes from the float model's, in nats),
        ``lost`` (accuracy lost, as a fraction, or the share of changed predictions without labels), ``parameters``; the
        costliest layer first.

    Raises:
        ConfigError: a mode without calibration.
        DataError: no samples, or none that :func:`~workbench.compress.quantization.quantize` takes.
        ModelError: the model is quantized already, or has nothing to quantize.
    """
    import pandas as pd

    check_unquantized(model)
    config = _static(config)
    samples = _Samples(data)
    source = copy.deepcopy(model).cpu().eval()
    batches = list(calibration_batches(samples.inputs, config.calibration_samples))
    sizes = {name: p.numel() for name, p in source.named_parameters()}
    try_out(source, samples.inputs[0][:2], "the calibration samples")
    reference = samples.logits(source)
    prepared, _ = calibrated(source, config, batches)
    rounding = _Rounding(prepared)
    rows = []
    for layer in rounding.layers:
        with rounding.only(layer):
            output = samples.logits(prepared)
        rows.append(
            {
                "layer": layer,
                "divergence": divergence(output, reference),
                "lost": samples.lost(output, reference),
                "parameters": sizes.get(f"{layer}.weight", 0),
            }
        )
    if not rows:
        raise ModelError("Nothing in this model can be quantized: it has no convolution or linear layer.", "Keep it as it is.")
    return pd.DataFrame(rows).sort_values("divergence", ascending=False, ignore_index=True)


def mixed_precision(
    model: nn.Module,
    config: QuantConfig | None = None,
    data: Any = None,
    *,
    max_loss: float = 0.01,
    measure: Callable[[nn.Module], float] | None = None,
) -> nn.Module:
    """Quantize, and leave in floating point the fewest of the most sensitive layers with which accuracy holds.

    Their number is found by bisection, as if each further layer helped; the result's record names them in ``keep_float``.

    Args:
        model, config, data: as for :func:`layer_sensitivity`.
        max_loss: what may be lost, from 0: a fraction up to 1, of accuracy with labels and of equal predictions without; with
            ``measure``, in its units.
        measure: a quality of your own, the higher the better, e.g. accuracy on held-out samples; by default on ``data``.

    Raises:
        ModelError: even one quantized layer loses more.
        ConfigError: ``max_loss`` is out of range.
        ConfigError, DataError, ModelError: as for :func:`layer_sensitivity`.
    """
    check_unquantized(model)
    config = _static(config)
    most = math.inf if measure else 1
    if not 0 <= max_loss <= most:
        raise ConfigError(
            f"max_loss={max_loss} must lie between 0 and {most}.", "Pass what may be lost: 0.01 is a point of accuracy."
        )
    order: list[str] = []
    samples = _Samples(data)
    source = copy.deepcopy(model).cpu().eval()
    try_out(source, samples.inputs[0][:2], "the calibration samples")
    reference = samples.logits(source)
    best = measure(source) if measure else 0.0

    def attempt(kept: int) -> tuple[nn.Module, float]:
        chosen = config.override({"keep_float": [*config.keep_float, *order[:kept]]})
        quantized = quantize(model, chosen, samples.inputs)
        return quantized, best - measure(quantized) if measure else samples.lost(samples.logits(quantized), reference)

    quantized, lost = attempt(0)
    if lost <= max_loss:
        return quantized
    order += layer_sensitivity(model, config, data)["layer"].tolist()
    low, high, found = 0, len(order), None
    while high - low > 1:
        middle = (low + high) // 2
        quantized, now = attempt(middle)
        if now <= max_loss:
            high, found = middle, quantized
        else:
            low, lost = middle, now
    if found is None:
        raise ModelError(
            f"With all but one layer in floating point {lost:.2%} is lost, more than max_loss={max_loss:.2%}.",
            "Train with QuantAwareTraining, use dtype bf16, or allow more.",
        )
    return found


def _static(config: QuantConfig | None) -> QuantConfig:
    config = QuantConfig.checked(config)
    if config.mode != "static" or config.backend != "cpu":
        raise ConfigError(
            f"Sensitivity is of static quantization for the CPU, not of mode={config.mode!r}, backend={config.backend!r}.",
            "Pass QuantConfig(mode='static').",
        )
    return config


def divergence(output: Tensor, reference: Tensor) -> float:
    """Mean Kullback–Leibler divergence, in nats, of the classes [N, C] that logits mean."""
    p, q = reference.double().log_softmax(1), output.double().log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


class _Rounding:
    """Switches the rounding of a calibrated graph on for one layer at a time."""

    def __init__(self, prepared: torch.fx.GraphModule) -> None:
        self._used: dict[str, list[Any]] = {}
        for node in prepared.graph.nodes:
            if (layer := layer_of(node)) is not None and node.args[1].op == "call_module":
                observers = [prepared.get_submodule(str(a.target)) for a in node.args[:2] if a.op == "call_module"]
                self._used.setdefault(layer, []).extend(observers)
        for module in prepared.modules():
            if hasattr(module, "rounds"):
                cast(Any, module).rounds = False

    @property
    def layers(self) -> list[str]:
        return sorted(self._used)

    def only(self, layer: str) -> _Switched:
        return _Switched(self._used[layer])


class _Switched:
    def __init__(self, observers: list[Any]) -> None:
        self._observers = observers

    def __enter__(self) -> None:
        for observer in self._observers:
            observer.rounds = True

    def __exit__(self, *error: object) -> None:
        for observer in self._observers:
            observer.rounds = False


class _Samples:
    """Inputs, and labels where there are any, in batches."""

    def __init__(self, data: Any) -> None:
        given: list[Any] = []

        def noted() -> Iterator[Any]:
            for batch in as_batches(data):
                given.append(batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None)
                yield batch

        self.inputs = list(calibration_batches(noted(), SCORED))
        if not self.inputs:
            raise DataError(
                "Sensitivity is measured on samples, and got none.", "Pass data=: a tensor (N, ...), or batches (x, y)."
            )
        classes = all(isinstance(y, Tensor) and y.dtype == torch.int64 and y.dim() == 1 for y in given)
        self.labels = torch.cat([y.detach().cpu() for y in given])[:SCORED] if classes else None

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(x) for x in self.inputs]).float()

    def lost(self, output: Tensor, reference: Tensor) -> float:
        """Accuracy lost, or the share of changed predictions without labels."""
        expected = reference.argmax(1) if self.labels is None else self.labels
        return ((reference.argmax(1) == expected).double().mean() - (output.argmax(1) == expected).double().mean()).item()
