"""Channels brought to one range where a depthwise convolution reads them: :func:`equalize`, and :func:`insert` to replay it.

One range for a whole tensor leaves its small channels few levels. Most layers mix channels, so that small ones matter little; a
depthwise convolution doesn't, and after normalization a channel that had four levels is as loud as any other. So the channels are
multiplied to one range before they are rounded, and the layer's weights, which have a scale a channel anyway, are divided by the
same: nothing is lost, and it costs a multiplication in floating point. Only the layers that gain much get one.

Source: after Nagel et al. (2019), arXiv:1906.04721, section 4.1, which puts the factors into the layer before: that needs an
activation function such as ReLU between the two, and no other reader of the value.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from workbench.compress.graph import layer_of, layers_matching

_ATEN = torch.ops.aten

TOLERATED = 1e-3
"""Noise that rounding a layer's input may make, relative to its output's variance; 8 bits for each channel make about 1e-4."""

GAIN = 4
"""How many times less noise equalizing must make to be worth its multiplication."""

WIDEST = 2.0**12
"""Largest factor."""


def equalize(exported: GraphModule, batches: list[Tensor], keep_float: Iterable[str] = ()) -> list[str]:
    """Multiply the channels of inputs of depthwise convolutions where rounding them would make much noise.

    Args:
        exported: changed in place, weights included.
        batches: calibration samples.
        keep_float: names or patterns of layers that aren't rounded.

    Returns:
        The layers that it was done for.
    """
    layers = {name for node in exported.graph.nodes if (name := layer_of(node)) is not None}
    rounded = layers - layers_matching(keep_float, layers)
    nodes = {node: name for node in exported.graph.nodes if (name := _depthwise(exported, node)) in rounded}
    watch = _Watch(exported, nodes)
    with torch.no_grad():
        for batch in batches:
            watch.run(batch)
        chosen = {nodes[node]: factors for node in nodes if (factors := watch.factors(node)) is not None}
        insert(exported, chosen)
        for name, factors in chosen.items():
            layer = exported.get_submodule(name)
            cast(Tensor, layer.input_factors).copy_(factors)
            cast(Tensor, layer.weight).div_(factors.movedim(1, 0))
    return list(chosen)


def insert(exported: GraphModule, layers: Iterable[str]) -> None:
    """Put a multiplication before each of ``layers``, by a buffer ``input_factors`` [1, C, 1, ...] of ones."""
    for name in layers:
        node = next(node for node in exported.graph.nodes if layer_of(node) == name)
        layer, value = exported.get_submodule(name), cast(Node, node.args[0])
        weight = cast(Tensor, layer.weight)
        layer.register_buffer("input_factors", torch.ones(1, len(weight), *[1] * (weight.dim() - 2)))
        with exported.graph.inserting_before(node):
            factors = exported.graph.get_attr(f"{name}.input_factors")
            product = exported.graph.call_function(_ATEN.mul.Tensor, (value, factors))
        factors.meta["val"], product.meta["val"] = layer.input_factors, value.meta["val"]
        node.args = (product, *node.args[1:])
    exported.recompile()


class _Watch(Interpreter):
    """Sees, channel by channel, what goes into some layers and what comes out."""

    def __init__(self, exported: GraphModule, nodes: Iterable[Node]) -> None:
        super().__init__(exported)
        self.nodes = set(nodes)
        self.seen: dict[Node, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def run_node(self, n: Node) -> Any:
        output = super().run_node(n)
        if n in self.nodes:
            x, y = (value.detach().movedim(1, 0).flatten(1).float() for value in (self.env[cast(Node, n.args[0])], output))
            self.seen.setdefault(n, []).append((x.amin(1).clamp(max=0), x.amax(1).clamp(min=0), y.var(1)))
        return output

    def factors(self, node: Node) -> Tensor | None:
        """[1, C, 1, ...] that bring the channels to the range of the widest; None where that gains little."""
        low, high, variance = (torch.stack(parts) for parts in zip(*self.seen[node], strict=True))
        ranges, variance = high.amax(0) - low.amin(0), variance.mean(0)
        weight = self.fetch_attr(str(cast(Node, node.args[1]).target)).detach()
        used = (variance > 0) & (ranges > 0)
        if not used.any():
            return None
        steps = torch.stack([ranges.max().expand_as(ranges), ranges]) / 255  # of a level, now and equalized
        noise = steps.square() / 12 * weight.flatten(1).square().sum(1) / variance
        now, then = noise[:, used].mean(1)
        if now < max(TOLERATED, GAIN * then):
            return None
        factors = torch.where(used, ranges.max() / ranges.clamp(min=1e-30), 1.0).clamp(max=WIDEST)
        return factors.view(1, -1, *[1] * (weight.dim() - 2))


def _depthwise(exported: GraphModule, node: Node) -> str | None:
    """The layer's name, if ``node`` is a convolution of each channel by itself, with one weight each."""
    name = layer_of(node)
    target = str(cast(Node, node.args[1]).target) if name is not None else ""
    if node.target is _ATEN.linear.default or not target.endswith(".weight"):
        return None
    weight = cast(Tensor, operator.attrgetter(target)(exported))
    groups = node.args[6] if len(node.args) > 6 else 1
    users = sum(layer_of(other) == name for other in exported.graph.nodes)
    return name if weight.shape[1] == 1 and groups == len(weight) > 1 and users == 1 else None
