"""Pruning criteria: functions from a group of coupled layers to one score a channel; the lowest scores go.

A criterion is called with torch-pruning's group over all channels of its first member, and returns a tensor of that length, or
None where it has nothing to say of the group. One that takes a second argument is given the :class:`Evidence`: the model, batches
of data, and the loss's gradients. Register it in ``pruning_config.CRITERIA``, or name it ``"file.py:function"``.

:func:`channel_rows` reads the weights of each channel off a group; :func:`merged` makes one score of those of several layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compress.pruning_config import CRITERIA
from workbench.compress.recurrent import RECURRENT, directions
from workbench.errors import ConfigError, DataError, WorkbenchError

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_STEPS = 16
"""Of the integral of conductance (Gauss-Legendre)."""
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass
class Evidence:
    """What a criterion may look at beside the weights.

    Attributes:
        model: the module that the groups' layers belong to, in evaluation mode.
        batches: (x, y) pairs on the model's device.
    """

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy for class indices, else mean squared error."""
        if y.is_floating_point():
            return nn.functional.mse_loss(output, y.view_as(output))
        return nn.functional.cross_entropy(output, y)

    @cached_property
    def gradients(self) -> dict[Tensor, Tensor]:
        """The loss's gradient by parameter, the mean over the batches."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        total: dict[Tensor, Tensor] = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        with torch.enable_grad():
            for x, y in self.batches:
                found = torch.autograd.grad(self.loss(self.model(x), y), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        total[parameter] += gradient / len(self.batches)
        return total


def batches_of(data: Any, samples: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The first ``samples`` of batches (x, y), on ``device``.

    Raises:
        DataError: there are none, or they aren't pairs of tensors.
    """
    taken: list[tuple[Tensor, Tensor]] = []
    left = samples
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    for batch in [data] if pair else data if isinstance(data, Iterable) and not isinstance(data, Tensor) else ():
        if not (isinstance(batch, tuple | list) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2])):
            raise DataError(f"A batch is a {type(batch).__name__}, not (x, y).", "Pass batches of input and target tensors.")
        x, y = batch[0][:left], batch[1][:left]
        taken.append((x.to(device), y.to(device)))
        left -= len(x)
        if left <= 0:
            break
    if sum(len(x) for x, _ in taken) == 0:
        raise DataError(f"The data is a {type(data).__name__} with no batch (x, y) in it.", "Pass batches (x, y), or one.")
    return taken


# Weights by channel -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What one layer of a group holds of each channel.

    Attributes:
        layer: the layer.
        is_out: its outputs are the group's channels, else its inputs.
        channels: the layer's channels that are in the group.
        values: [channels, weights of one].
        roots: the group's channel of each.
    """

    layer: nn.Module
    is_out: bool
    channels: list[int]
    values: Tensor
    roots: list[int]


def channel_rows(group: Any, value: Callable[[Tensor], Tensor] = Tensor.detach) -> Iterator[Rows]:
    """The rows of each convolution, linear, recurrent and normalization layer of ``group``.

    Args:
        value: applied to each parameter first: itself, its gradient, a product.
    """
    for item in group.items:
        (dep, idxs), roots = item, item.root_idxs
        layer, is_out = dep.target.module, "out" in dep.handler.__name__
        if any(root is None for root in roots) or (rows := _rows(layer, is_out, value)) is None:
            continue
        yield Rows(layer, is_out, list(idxs), rows[torch.tensor(idxs, device=rows.device)], list(roots))


def _rows(layer: Any, is_out: bool, value: Callable[[Tensor], Tensor]) -> Tensor | None:
    if isinstance(layer, RECURRENT):
        return _recurrent_rows(layer, is_out, value)
    if isinstance(layer, _NORMS):
        return None if layer.weight is None else value(layer.weight).flatten()[:, None]
    if not isinstance(layer, _CONV | nn.Linear):
        return None
    weight = value(layer.weight)
    outputs_first = not isinstance(layer, _TRANSPOSED)
    if is_out or (isinstance(layer, _CONV) and layer.groups == layer.out_channels):
        return (weight if outputs_first else weight.transpose(0, 1)).flatten(1)
    inputs = (weight.transpose(0, 1) if outputs_first else weight).flatten(1)
    return inputs.repeat(getattr(layer, "groups", 1), 1) if outputs_first else inputs


def _recurrent_rows(layer: nn.RNNBase, is_out: bool, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a hidden unit, its rows in all gates of the last layer, one direction after the other; of an input, its columns."""
    ends = ("", "_reverse")[: directions(layer)]
    if not is_out:
        return torch.cat([value(getattr(layer, f"weight_ih_l0{end}")).t() for end in ends], 1)
    last = layer.num_layers - 1

    def units(name: str) -> Tensor:
        weight = value(getattr(layer, name))
        return weight.view(-1, layer.hidden_size, weight.shape[1]).transpose(0, 1).flatten(1)

    return torch.cat([torch.cat([units(f"weight_ih_l{last}{end}"), units(f"weight_hh_l{last}{end}")], 1) for end in ends])


def merged(group: Any, scores: Iterable[tuple[list[int], Tensor]], mean: bool = True) -> Tensor | None:
    """One score a channel: the mean over layers of what each says, relative to the group's mean so that groups compare.

    Args:
        scores: by layer, the group's channels and a score each.
        mean: divide by the group's mean.
    """
    total: Tensor | None = None
    count = 0
    for roots, score in scores:
        if total is None:
            total = score.new_zeros(len(group[0].idxs))
        total = total.index_add(0, torch.tensor(roots, device=score.device), score.to(total.dtype))
        count += 1
    if total is None:
        return None
    total = total / count
    return total / total.mean().clamp_min(1e-12) if mean else total


# Criteria ---------------------------------------------------------------------------------------------------------------


def l1(group: Any) -> Tensor | None:
    """Sum of absolute weights (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017)."""
    return merged(group, ((rows.roots, rows.values.abs().sum(1)) for rows in channel_rows(group)))


def l2(group: Any) -> Tensor | None:
    """Sum of squared weights."""
    return merged(group, ((rows.roots, rows.values.square().sum(1)) for rows in channel_rows(group)))


def bn_scale(group: Any) -> Tensor | None:
    """Absolute scale in the batch normalization after a channel (Liu et al., "Network Slimming", ICCV 2017, section 3).

    The scales of a scope's groups compare as they are: training with ``penalties={"slimming": 1e-4}`` first drives some to zero.
    """
    norms = (rows for rows in channel_rows(group) if isinstance(rows.layer, nn.modules.batchnorm._BatchNorm))
    return merged(group, ((rows.roots, rows.values.abs().sum(1)) for rows in norms), mean=False)


def taylor(group: Any, evidence: Evidence) -> Tensor | None:
    """Sum of |weight × gradient| (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8)."""

    def change(parameter: Tensor) -> Tensor:
        return (parameter * evidence.gradients[parameter]).detach()

    return merged(group, ((rows.roots, rows.values.abs().sum(1)) for rows in channel_rows(group, change)), mean=False)


def fpgm(group: Any) -> Tensor | None:
    """Sum of distances to the other channels: those near the geometric median can be replaced by the others (He et al., "Filter
    Pruning via Geometric Median", CVPR 2019, equation 8)."""
    layers = (rows for rows in channel_rows(group) if not isinstance(rows.layer, _NORMS))
    return merged(group, ((rows.roots, torch.cdist(rows.values, rows.values).sum(1)) for rows in layers))


def lamp(group: Any) -> Tensor | None:
    """Squared weights relative to those of all channels that would still be there when its turn comes (Lee et al.,
    "Layer-Adaptive Sparsity for Magnitude-based Pruning", ICLR 2021, equation 1; here of channels)."""
    scores = l2(group)
    if scores is None:
        return None
    ordered, order = scores.sort()
    left = ordered.flip(0).cumsum(0).flip(0)
    return torch.empty_like(scores).index_copy_(0, order, ordered / left.clamp_min(1e-12))


def random(group: Any) -> Tensor:
    """A random score each: the baseline that a criterion must beat."""
    return torch.rand(len(group[0].idxs))


def attribution(group: Any, evidence: Evidence) -> Tensor | None:
    """Mean absolute conductance of a channel for the target class (Dhamdhere et al., "How Important Is a Neuron?", ICLR 2019),
    by Captum; of models of token ids, gradient × activation."""

    makers: list[tuple[Any, Any]] = []
    readers: list[tuple[Any, Any]] = []
    for item in group.items:
        layer, is_out = item.dep.target.module, "out" in item.dep.handler.__name__
        if isinstance(layer, _CONV | nn.Linear | nn.Embedding) and not (isinstance(layer, _CONV) and layer.groups > 1):
            (makers if is_out else readers).append((layer, item))
    # Of what no such layer makes (a recurrent layer's states), what reads it.
    found = [(item, _conductance(layer, evidence, of_input=not makers)) for layer, item in makers or readers]
    return merged(group, [(item.root_idxs, score[list(item.idxs)]) for item, score in found])


def _conductance(layer: Any, evidence: Evidence, of_input: bool) -> Tensor:
    """Mean over samples of the summed absolute attribution of each output channel of ``layer``, or of each input."""
    from captum.attr import LayerConductance, LayerGradientXActivation

    channel_dim = 1 if isinstance(layer, _CONV) else -1
    total, samples = None, 0
    for x, y in evidence.batches:
        target = None if y.is_floating_point() else y
        with torch.enable_grad():
            if x.is_floating_point():
                found = LayerConductance(evidence.model, layer).attribute(
                    x, target=target, n_steps=_STEPS, attribute_to_layer_input=of_input
                )
            else:
                found = LayerGradientXActivation(evidence.model, layer).attribute(
                    x, target=target, attribute_to_layer_input=of_input
                )
        found = found[0] if isinstance(found, tuple) else found
        each = found.detach().abs().movedim(channel_dim, -1).flatten(0, -2).sum(0)
        total = each if total is None else total + each
        samples += len(x)
    assert total is not None
    return total / samples


# Looking criteria up ----------------------------------------------------------------------------------------------------


def scored_by(name: str, evidence: Evidence | None) -> Callable[[Any], Tensor | None]:
    """The criterion ``name``, checked: a finite score a channel.

    Raises:
        ConfigError: it takes data, and there is none.
    """
    function = CRITERIA.factory(name)
    takes_data = len(inspect.signature(function).parameters) > 1
    if takes_data and (evidence is None or not evidence.batches):
        raise ConfigError(
            f"The criterion {name!r} looks at data, and none was given.",
            "Pass data=, batches (x, y) of training samples, to prune.",
        )

    def checked(group: Any) -> Tensor | None:
        expected = len(group[0].idxs)
        try:
            scores = function(group, evidence) if takes_data else function(group)
        except WorkbenchError:
            raise
        except Exception as error:  # a user's own function, or a model that doesn't take the data
            raise ConfigError(
                f"The criterion {name!r} failed: {type(error).__name__}: {error}.", "Check it, and that the data fits the model."
            ) from error
        if scores is None:
            return None
        if not isinstance(scores, Tensor) or scores.shape != (expected,):
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(f"The criterion {name!r} gave {found} for {expected} channels.", "Return one score a channel.")
        if not scores.isfinite().all():
            raise ConfigError(f"The criterion {name!r} gave scores that aren't finite.", "Check the weights and the data.")
        return scores.detach().float().cpu()

    return checked
