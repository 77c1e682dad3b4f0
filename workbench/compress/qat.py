"""Training that knows of INT8: the model computes in floating point with values rounded as they will be.

* :class:`QuantAwareTraining` — ``QuantAwareTraining(model, QuantConfig(mode="qat"), example).prepare()`` gives a module that
  trains like any other; :func:`~workbench.compress.quantization.quantize` then turns it into INT8.
* :class:`LearnedRange` — rounds an activation to the range that it has followed.
* :func:`replay` and :func:`plain_copy` — put the rounding into a freshly built model, and take it out again.

The model keeps its own modules: only their classes change, so batch normalization and dropout stay what they were, training mode
switches as ever, and the weights keep their names. Where values are rounded is read off the very graph that will become INT8 (see
:mod:`~workbench.compress.rounding`), so that given the same values each layer of both computes the same. Their sums differ in the
last digits of fp32, though, and a value on the edge between two levels then falls to either side: a deep network makes as much of
that as of any change to its input in the last digits.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.compress.graph import check_unquantized, our_versions
from workbench.compress.observers import scale_and_zero_point, weight_scale
from workbench.compress.quantization_config import QuantConfig
from workbench.compress.rounding import rounding_points
from workbench.compress.sample import one_sample
from workbench.errors import ArtefactError, ConfigError, ModelError
from workbench.models.structure import structure_of

FOLLOWED = 0.01
"""Share of the newest batch in a learned range."""


class QuantAwareTraining:
    """Prepare a model for fine-tuning with INT8's rounding; the given model stays as it is.

    Args:
        model: trained in floating point, as a rule.
        config: with ``mode="qat"``.
        example: inputs (N, ...) of the shape and type that the model takes; without it, inferred from the first layer.

    Example:
        >>> prepared = QuantAwareTraining(model, QuantConfig(mode="qat"), x).prepare()
        >>> trained = train(config, model=prepared).model
        >>> int8 = quantize(trained)

    Source: Jacob et al. 2018, section 3; Krishnamoorthi, arXiv:1806.08342, section 3.2.3, for batch normalization.
    """

    def __init__(self, model: nn.Module, config: QuantConfig | None = None, example: Any = None) -> None:
        self.model, self.example = model, example
        self.config = QuantConfig(mode="qat") if config is None else QuantConfig.checked(config)
        if self.config.mode != "qat":
            raise ConfigError(f"mode={self.config.mode!r} isn't trained.", 'Pass QuantConfig(mode="qat"), or call quantize.')

    def prepare(self) -> nn.Module:
        """A copy of the model that rounds its weights and activations while it trains.

        Raises:
            ModelError: the model can't be exported (the message names the line), has nothing to quantize, is so prepared, or is
                quantized already.
        """
        check_unquantized(self.model)
        if is_prepared(self.model):
            raise ModelError("This model is prepared for quantization-aware training already.", "Train it, then quantize it.")

        source = copy.deepcopy(self.model).cpu().eval()
        x = one_sample(source, self.example).cpu()
        points = rounding_points(source, x, self.config)
        record = {
            "kind": "qat",
            "config": self.config.model_dump(mode="json"),
            "input": {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")},
            **points,
            "versions": our_versions(),
        }
        prepared = replay(copy.deepcopy(self.model), record)
        prepared.structure = structure_of(self.model).then(record)  # type: ignore[assignment]
        return prepared


class LearnedRange(nn.Module):
    """Rounds its input to 8-bit levels between ``low`` and ``high``, which follow the extremes of training batches.

    Gradients pass unchanged within the range and not at all beyond it (Bengio et al., arXiv:1308.3432).
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("low", "high", "seen"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.training:
            self._follow(values.detach())
        scale, zero = scale_and_zero_point(self.low, self.high, self.config)
        top = 2**self.config.activation_bit - 1
        rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero.int(), 0, top)
        return torch.where(self.seen > 0, rounded, values).to(x.dtype)

    @torch.no_grad()
    def _follow(self, values: Tensor) -> None:
        # Without branches on values: none is read back from the device.
        low, high = torch.aminmax(values)
        share = torch.where(self.seen > 0, FOLLOWED, 1.0)
        self.low += share * (low - self.low)
        self.high += share * (high - self.high)
        self.seen.fill_(1)

    def scale_and_zero_point(self) -> list[float]:
        """Of the INT8 value that this stands for."""
        scale, zero = scale_and_zero_point(self.low, self.high, self.config)
        return [scale.item(), int(zero)]


class RoundsOutput(nn.Module):
    """Mixed into the class of a module whose output becomes INT8."""

    output_range: LearnedRange

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output_range(super().forward(*args, **kwargs))


class RoundsWeight(nn.Module):
    """Mixed into the class of a convolution or linear layer: rounds its weight, and its input where nothing before does.

    The weight is rounded as it will be with batch normalization folded into it, by the running statistics.
    """

    input_range: LearnedRange | None

    def forward(self, x: Tensor) -> Tensor:
        if self.input_range is not None:
            x = self.input_range(x)
        if isinstance(self, nn.Linear):
            return F.linear(x, self.rounded_weight(), self.bias)
        convolution = cast(nn.Conv2d, self)
        return convolution._conv_forward(x, self.rounded_weight(), convolution.bias)

    def rounded_weight(self) -> Tensor:
        """The layer's weight, such that what follows sees the rounded, folded one."""
        weight, config = cast(Tensor, self.weight), cast(QuantConfig, self._config)
        factor = self._folded_factor(weight)
        folded = weight * factor
        scale = weight_scale(folded.detach(), config.by_channel)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(folded, scale, zero, 0, -128, 127) / factor

    def _folded_factor(self, weight: Tensor) -> Tensor:
        """What batch normalization multiplies each output channel by, shaped to multiply the weight; 1 without any."""
        norms = cast(tuple[nn.BatchNorm2d, ...], self._norm)
        if not norms:
            return weight.new_ones(())
        norm = norms[0]
        with torch.no_grad():
            factor = torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
            if norm.affine:
                factor = factor * norm.weight
            factor = torch.where(factor == 0, 1.0, factor)  # the channel is 0 whatever its weight
        return factor.view(-1, *[1] * (weight.dim() - 1))


def replay(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """``model`` itself, made to round as ``record`` says."""
    config = QuantConfig(**record["config"])
    for name in record["layers"]:
        module = _mix(model.get_submodule(name), RoundsWeight)
        norm = record["norms"].get(name)
        module.input_range = LearnedRange(config) if name in record["inputs"] else None  # type: ignore[assignment]
        module._config = config  # type: ignore[assignment]
        # In a tuple: the layer needs its normalization, but doesn't own it.
        module._norm = () if norm is None else (model.get_submodule(norm),)  # type: ignore[assignment]
    for name in record["outputs"]:  # last, and so outermost
        module = _mix(model.get_submodule(name), RoundsOutput)
        module.output_range = LearnedRange(config)
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a prepared model in floating point, with no rounding left."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for mixin, attributes in ((RoundsOutput, ("output_range",)), (RoundsWeight, ("input_range", "_config", "_norm"))):
            if isinstance(module, mixin):
                for attribute in attributes:
                    delattr(module, attribute)
        while isinstance(module, RoundsOutput | RoundsWeight):
            module.__class__ = type(module).__bases__[1]
    return plain


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` rounds as INT8 will, and hasn't been converted to it."""
    transforms = structure_of(model).transforms
    return bool(transforms) and transforms[-1]["kind"] == "qat"


def qat_record(model: nn.Module) -> dict[str, Any]:
    """The record of the preparation of a prepared model."""
    return structure_of(model).transforms[-1]


def current_record(model: nn.Module) -> dict[str, Any]:
    """:func:`qat_record` as this version of torch and torchao would make it.

    Raises:
        ArtefactError: it would round elsewhere.
    """
    record = qat_record(model)
    if record["versions"] == our_versions():
        return record
    # Others may give the values of the graph other names; what follows their ranges has the name of its module.
    x = torch.zeros(2, *record["input"]["shape"], dtype=getattr(torch, record["input"]["dtype"]))
    points = rounding_points(plain_copy(model).cpu().eval(), x, QuantConfig(**record["config"]))
    places = set(record["ranges"].values())
    if different := places ^ set(points["ranges"].values()):
        raise ArtefactError(
            f"This model was prepared with {record['versions']}, and {our_versions()} differs in {len(different)} values that it "
            f"would round: {sorted(different)[0]} …",
            "Quantize it with those versions, or prepare and train it again.",
        )
    return record | points | {"versions": our_versions()}


def learned_ranges(model: nn.Module, record: dict[str, Any]) -> dict[str, list[float]]:
    """{value: [scale, zero point]} of the graph that a prepared model becomes.

    Raises:
        ModelError: it has not been trained.
    """
    ranges = {value: cast(LearnedRange, model.get_submodule(path)) for value, path in record["ranges"].items()}
    if not all(learned.seen.item() for learned in ranges.values()):
        raise ModelError("This model has learned no activation ranges yet.", "Train it first: train(config, model=prepared).")
    return {value: learned.scale_and_zero_point() for value, learned in ranges.items()}


def _mix(module: nn.Module, mixin: type[nn.Module]) -> nn.Module:
    cls = type(module)
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
    return module
