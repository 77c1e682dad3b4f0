"""Which layers speak for an output: conductance and internal influence of every layer, from one walk along the path.

The inputs go in steps from the baseline to what they are; at each, every layer's output and the gradient by it are noted. What a
layer's output gained from step to step, times the gradient, summed, is its conductance: the part of the output's difference that
flows through it. At a layer that everything flows through, it sums to the whole difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.attribution.calls import (
    embedding_of,
    evaluating,
    gradients_of,
    is_ids,
    output_at,
    outputs_of,
    part_of,
    targets_of,
)
from workbench.attribution_config import AttributionConfig
from workbench.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

PILOTS = 8
"""Samples of a batch that show where the path needs points."""

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass
class _Sums:
    """Of a layer, over all samples; ``channels`` (C,) holds the absolute conductances."""

    kind: str
    channels: Tensor
    conductance: float = 0.0
    influence: float = 0.0


@dataclass
class _Layer:
    """One call of a layer: what it gave at the last two steps, and the sums so far, of the output's shape (N, ...)."""

    kind: str
    channel: int
    value: Tensor
    slope: Tensor
    before: tuple[Tensor, Tensor] | None = None
    conductance: Tensor = field(default_factory=lambda: torch.zeros(()))
    influence: Tensor = field(default_factory=lambda: torch.zeros(()))

    def step(self, size: float) -> None:
        """Add what lies between the last step and this one, by the trapezoidal rule."""
        if self.before is not None:
            value, slope = self.before
            mean = (slope + self.slope) / 2
            self.conductance = self.conductance + mean * (self.value - value)
            self.influence = self.influence + mean * size
        self.before = self.value, self.slope
        self.slope = torch.zeros_like(self.slope)  # where no gradient comes, nothing depends on it


def explain_layers(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int | None = None,
    layers: Sequence[str] | None = None,
    config: AttributionConfig | None = None,
) -> pd.DataFrame:
    """How much of the output's difference from the baseline flows through each layer, means over the samples.

    Args:
        model: gives outputs (N, classes); it is asked in evaluation mode and stays as it is.
        x: inputs (N, ...), on the model's device; the path of token ids runs through their embeddings.
        target: class whose output is explained, one or one a sample (N,); by default the one that the model prefers.
        layers: names or patterns (``"layer1.*"``); by default every layer that has parameters of its own.
        config: baseline, steps, batch size.

    Returns:
        One row a call of a layer, in the order of the calls: ``layer``; ``kind``, its class; ``conductance``, in units of the
        output; ``share``, that as a part of the difference: 1 where everything flows through the layer, less in a branch;
        ``absolute``, the sum of its units' absolute conductances: larger than the difference where units speak against each
        other; ``influence``, the Euclidean norm over the units of the internal influence, by which the output follows theirs;
        ``channels``, how many it has, and ``half``, the fewest that hold half of ``absolute``. ``attrs["difference"]`` is the
        difference itself.

    Raises:
        ConfigError: a pattern matches no layer, or none of the layers was called.
        ModelError: the model has no gradients.

    Sources: Dhamdhere et al. 2018 (arXiv:1805.12233); Leino et al. 2018 (arXiv:1802.03788).
    """
    import pandas as pd

    config = AttributionConfig.checked(config)
    chosen = _chosen(model, layers)
    sums: dict[str, _Sums] = {}
    difference, samples = 0.0, len(x)
    with evaluating(model):
        for start in range(0, samples, config.batch_size):
            part = x[start : start + config.batch_size].detach()
            targets = targets_of(outputs_of(model, part), part_of(target, slice(start, start + config.batch_size)))
            walked, gained = _walk(model, part, targets, chosen, config)
            difference += gained
            for name, layer in walked.items():
                _add(sums, name, layer)
    if not sums:
        raise ConfigError(f"None of the layers {sorted(chosen)} was called.", "Name others of model.named_modules().")
    rows = [_row(name, row, difference / samples, samples) for name, row in sums.items()]
    frame = pd.DataFrame(rows)
    frame.attrs["difference"] = difference / samples
    return frame


def _chosen(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    named = {name: module for name, module in model.named_modules() if name}
    if patterns is None:
        return {name: module for name, module in named.items() if next(module.parameters(recurse=False), None) is not None}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(f"No layer is named {pattern!r}.", "Name some of model.named_modules(); * stands for anything.")
    return {name: module for name, module in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _walk(
    model: nn.Module, x: Tensor, target: Tensor, chosen: dict[str, nn.Module], config: AttributionConfig
) -> tuple[dict[str, _Layer], float]:
    """The layers after the whole path, and the output's difference between its ends, summed over the samples."""
    with torch.no_grad():
        start = torch.full_like(x[:1], config.baseline)
        embedding = embedding_of(model, x) if is_ids(x) else None
        start, end = (start, x) if embedding is None else (embedding(start), embedding(x))
        shares = _shares(model, x[:PILOTS], start, end[:PILOTS], embedding, chosen, config.steps)
    found: dict[str, _Layer] = {}
    ends = []
    share = 0.0
    with gradients_of(model):
        for following in shares:
            last, share = share, following
            point = (share * end + (1 - share) * start).detach().requires_grad_()
            with _noting(chosen, found):
                asked = output_at(model, x, point, embedding).gather(1, target[:, None]).sum()
                torch.autograd.grad(asked, point)
            for layer in found.values():
                layer.step(share - last)
            ends.append(float(asked.detach()))
    return found, ends[-1] - ends[0]


def _shares(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    end: Tensor,
    embedding: nn.Module | None,
    chosen: dict[str, nn.Module],
    steps: int,
) -> list[float]:
    """Places along the path, 0 to 1, between which the outputs of the layers change about equally much.

    A normalization layer turns an almost constant input into a full one: what happens may happen within a thousandth of the path.
    """
    looks = sorted({0.0, *(10 ** (power / 8) for power in range(-56, 0)), *(step / 16 for step in range(1, 17))})
    values: dict[str, Tensor] = {}
    lengths: dict[str, list[float]] = {}

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.is_floating_point():
                if name in values:
                    lengths.setdefault(name, []).append(float((value - values[name]).norm()))
                values[name] = value.clone()

        return note

    handles = [module.register_forward_hook(hook_of(name)) for name, module in chosen.items()]
    try:
        for share in looks:
            output_at(model, x, share * end + (1 - share) * start, embedding)
    finally:
        for handle in handles:
            handle.remove()
    # A fifth of the points goes by the path itself; layers that are called several times, or not at all, are left to it.
    known = [each for each in lengths.values() if len(each) == len(looks) - 1 and 0 < sum(each) < math.inf]
    parts = [sum(each[place] / sum(each) for each in known) / max(1, len(known)) for place in range(len(looks) - 1)]
    passed = np.cumsum([0.0, *(0.8 * part + 0.2 * (b - a) for part, a, b in zip(parts, looks, looks[1:], strict=False))])
    places: list[float] = np.interp(np.linspace(0, passed[-1], steps + 1), passed, looks).tolist()
    return places


@contextmanager
def _noting(chosen: dict[str, nn.Module], found: dict[str, _Layer]) -> Iterator[None]:
    """During one call of the model: note each output of the chosen layers, and the gradient by it."""
    calls: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        if inputs and output is inputs[0]:  # as of an identity: else the gradient by it would be that by its input
            output = output.clone()
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.requires_grad:
            return output
        calls[name] = calls.get(name, 0) + 1
        key = name if calls[name] == 1 else f"{name} ({calls[name]})"
        value = tensor.detach().clone()  # a layer that works in place overwrites it
        if key in found:
            found[key].value = value
        else:
            found[key] = _Layer(type(module).__name__, _channel_of(module, tensor), value, torch.zeros_like(value))
        tensor.register_hook(lambda slope: setattr(found[key], "slope", slope.detach()))
        return output

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, inputs, output: note(name, module, inputs, output)

    handles = [module.register_forward_hook(hook_of(name)) for name, module in chosen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_of(module: nn.Module, output: Tensor) -> int:
    """The dimension of the channels."""
    last = isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding) or output.dim() < 4
    return 1 if isinstance(module, _CHANNELS_FIRST) or not last else output.dim() - 1


# Rows --------------------------------------------------------------------------------------------------------------------


def _add(sums: dict[str, _Sums], name: str, layer: _Layer) -> None:
    """Add a batch to the sums of its layer."""
    channels = layer.conductance.abs().movedim(layer.channel, -1).flatten(0, -2).sum(0).double().cpu()
    row = sums.setdefault(name, _Sums(layer.kind, torch.zeros_like(channels)))
    row.conductance += float(layer.conductance.double().sum())
    row.influence += float(layer.influence.flatten(1).double().norm(dim=1).sum())
    row.channels += channels


def _row(name: str, row: _Sums, difference: float, samples: int) -> dict[str, Any]:
    conductance, absolute = row.conductance / samples, float(row.channels.sum()) / samples
    held = row.channels.sort(descending=True).values.cumsum(0)
    return {
        "layer": name,
        "kind": row.kind,
        "conductance": conductance,
        "share": conductance / difference if difference else math.nan,
        "absolute": absolute,
        "influence": row.influence / samples,
        "channels": len(row.channels),
        "half": int((held < held[-1] / 2).sum()) + 1,
    }
