"""Biases that make up for what rounding does to the mean: :func:`correct_biases`."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from workbench.compress.graph import layer_of

LARGEST = 64 * 3 * 224 * 224
"""Numbers, at most, in the inputs that are used: what several layers give for all of them is held at a time."""


def correct_biases(prepared: GraphModule, batches: list[Tensor]) -> None:
    """Move each layer's bias so that the mean of each output channel is what it is in floating point.

    Rounding and clipping shift means, most of all where few numbers make up an output, as in depthwise convolutions. Layers are
    corrected in their order, each on what those before it give when they are rounded and corrected.

    Args:
        prepared: calibrated; changed in place. Layers without a bias, or that share one, stay as they are.
        batches: inputs [N, ...], of which the first are used.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), arXiv:1906.04721,
    section 4.2; means are measured on samples, as in its appendix D.
    """
    x = torch.cat(batches)
    x = x[: max(1, LARGEST // x[0].numel())]
    with torch.no_grad():
        _Correction(prepared).run(torch.cat([x, x]))


class _Correction(Interpreter):
    """Computes the first half of a batch in floating point and the second half rounded, and corrects biases on the way."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self._uses = Counter(bias.target for node in prepared.graph.nodes if (bias := _bias(node)) is not None)

    def run_node(self, n: Node) -> Any:
        if n.op == "call_module" and hasattr(observer := self.fetch_attr(str(n.target)), "rounded"):
            value = self.env[cast(Node, n.args[0])]
            if cast(Node, n.args[0]).op == "get_attr":
                return value, observer.rounded(value)
            exact, other = value.chunk(2)
            return torch.cat([exact, observer.rounded(other)])
        return self._layer(n) if layer_of(n) is not None else super().run_node(n)

    def _layer(self, n: Node) -> Tensor:
        (x, weight, *rest), settings = self.fetch_args_kwargs_from_env(n)
        weights = weight if isinstance(weight, tuple) else (weight, weight)
        exact, rounded = (
            cast(Any, n.target)(half, weight, *rest, **settings) for half, weight in zip(x.chunk(2), weights, strict=True)
        )
        bias = _bias(n)
        if bias is not None and self._uses[bias.target] == 1:
            channels = -1 if n.target is torch.ops.aten.linear.default else 1
            shift = (exact - rounded).movedim(channels, 0).flatten(1).mean(1)
            self.env[bias].data += shift
            rounded += shift.view(-1, *[1] * (rounded.dim() - 2)) if channels == 1 else shift
        return torch.cat([exact, rounded])


def _bias(node: Node) -> Node | None:
    """Where a layer's bias is read; None where it has none."""
    given = node.args[2] if layer_of(node) is not None and len(node.args) > 2 else None
    return given if isinstance(given, Node) and given.op == "get_attr" else None
