"""Gradients of copies averaged within the compiled backward pass.

Under DDP the gradients of a model that is compiled as a whole all come at once, when its backward pass is over: nothing is left
for the exchange to hide behind. :class:`Averaging` writes the exchange into the graph, each bucket of it where its last gradient
has been computed; Inductor then compiles, and CUDA graphs capture, computation and exchange as one.

Bucketing by the order in which gradients come is that of Li et al. 2020, PyTorch Distributed (arXiv:2006.15704, section 3.2).
Ranks may compile for batches of other shapes: all exchange the same buckets in the same order, since neither depends on a shape.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import workbench.training.device_time  # noqa: F401  its operator

ATEN, C10D = torch.ops.aten, torch.ops._c10d_functional

ALIGNED = 64
"""Elements to whose multiples gradients are sorted within a bucket: kernels read several at once, from aligned addresses."""

SHADE = 2.0
"""Bytes of other matrices' gradients to compute while a large one travels, as a multiple of its own: those travel after it, and
the last of them should be computed when the wire is free again. On H200s a matrix of BERT takes 1.6 times as long to compute at
8,192 tokens as to send.
"""


class Averaging:
    """Means over the ranks of a group in the place of a joint graph's gradients, as its last pass.

    Args:
        group: name of the process group.
        ranks: in it.
        bucket: MiB of gradients that travel together; infinity for all at once.
        wire: type in which they travel, or None for their own.
    """

    file = __file__
    """What it does is written there: a change of it makes graphs compiled before unfit."""

    def __init__(self, group: str, ranks: int, bucket: float, wire: torch.dtype | None) -> None:
        self._group, self._ranks, self._bucket, self._wire = group, ranks, bucket * 2**20, wire

    def __repr__(self) -> str:
        return f"Averaging({self._group}, {self._ranks}, {self._bucket}, {self._wire}, {SHADE})"

    def __call__(self, graph: Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        primals = [node for node in inputs if not node.name.startswith("tangents")]
        if len(primals) == len(inputs):
            return  # no backward pass
        end = next(node for node in reversed(graph.nodes) if node.op == "output")
        outputs: list[Any] = list(end.args[0])
        # A joint graph gives its outputs, then by input a gradient or None.
        places = [place for place in range(len(outputs) - len(primals), len(outputs)) if outputs[place] is not None]
        put_matrices_off({outputs[place] for place in places}, self._bucket)
        order = {node: place for place, node in enumerate(graph.nodes)}
        places.sort(key=lambda place: order[outputs[place]])
        sizes, types = [_value(outputs[place]).nbytes for place in places], [_value(outputs[place]).dtype for place in places]
        buckets = [[places[index] for index in bucket] for bucket in cut(sizes, types, self._bucket)]
        sent: list[tuple[list[int], Node]] = []
        moment: Node | None = None
        for bucket in buckets:
            bucket.sort(key=lambda place: -math.gcd(_value(outputs[place]).numel(), ALIGNED))
            newest = max((inputs[-1], *(outputs[place] for place in bucket)), key=lambda node: order[node])
            with graph.inserting_before(newest.next):
                flat = self._packed([outputs[place] for place in bucket])
                if bucket is buckets[-1]:
                    moment = _call(torch.ops.workbench.mark.default, _call(ATEN.slice.Tensor, flat, 0, 0, 1))
                sent.append((bucket, _call(C10D.all_reduce.default, flat, "sum", self._group)))
        with graph.inserting_before(end):
            for bucket, travelling in sent:
                flat, begin = _call(C10D.wait_tensor.default, travelling), 0
                for place in bucket:
                    like = _value(outputs[place])
                    outputs[place] = _unpacked(flat, begin, like)
                    begin += like.numel()
            if moment is not None:  # an operator whose result nothing depends on would be left out
                least = min(buckets[-1], key=lambda place: _value(outputs[place]).numel())
                outputs[least] = _with_nothing_of(moment, outputs[least])
        end.args = (outputs,)

    def _packed(self, gradients: Sequence[Node]) -> Node:
        """Gradients one after another in memory order, divided by the number of ranks, in the type that travels."""
        parts = []
        for node in gradients:
            value = _value(node)
            if _channels_last(value):
                node = _call(ATEN.permute.default, node, [0, 2, 3, 1])
            parts.append(_call(ATEN.reshape.default, node, [value.numel()]))
        flat = _call(ATEN.mul.Tensor, _call(ATEN.cat.default, parts) if len(parts) > 1 else parts[0], 1 / self._ranks)
        return flat if self._wire is None else _converted(flat, self._wire)


def put_matrices_off(gradients: Collection[Node], bucket: float) -> None:
    """Compute other matrices' gradients behind the last one of more than ``bucket`` bytes, as nothing waits for them, until
    :data:`SHADE` times its bytes follow it.

    A text model's largest gradient, its embedding's, is its last: else it would travel when there is nothing left to compute.
    """
    nodes = list(next(iter(gradients)).graph.nodes) if gradients else []
    ordered = [node for node in nodes if node in gradients]
    last = next((place for place in reversed(range(len(ordered))) if _value(ordered[place]).nbytes > bucket), None)
    if last is None:
        return
    large = ordered[last]
    missing = SHADE * _value(large).nbytes - sum(_value(node).nbytes for node in ordered[last + 1 :])
    needed = {large}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    chosen: set[Node] = set()
    for node in reversed(ordered[:last]):
        if missing > 0 and _value(node).ndim > 1 and node not in needed:
            chosen.add(node)
            missing -= _value(node).nbytes
    moved: set[Node] = set()
    before = nodes[: nodes.index(large)]
    for node in reversed(before):
        users = {user for user in node.users if user.op != "output"} if node in chosen else node.users
        if node.op == "call_function" and (users or node in chosen) and all(user in moved for user in users):
            moved.add(node)
    place = large
    for node in before:
        if node in moved:
            place.append(node)
            place = node


def cut(sizes: Sequence[int], types: Sequence[torch.dtype], bucket: float) -> list[list[int]]:
    """Places of gradients, in the order in which they come, by bucket; one type each.

    Nothing hides the last buckets' journey: they are smaller, a half and an eighth.

    Args:
        sizes: bytes of each gradient.
        bucket: bytes after which a bucket is closed.
    """
    found: list[list[int]] = []
    total = 0
    for place in reversed(range(len(sizes))):
        limit = bucket / {1: 8, 2: 2}.get(len(found), 1)
        if not found or total + sizes[place] > limit or types[place] != types[found[-1][-1]]:
            found.append([])
            total = 0
        found[-1].append(place)
        total += sizes[place]
    return [bucket[::-1] for bucket in reversed(found)]


def _unpacked(flat: Node, begin: int, like: Tensor) -> Node:
    """One gradient out of a bucket that has come, of ``like``'s shape, type and order in memory."""
    node = _converted(_call(ATEN.slice.Tensor, flat, 0, begin, begin + like.numel()), like.dtype)
    if _channels_last(like):
        n, c, h, w = like.shape
        return _call(ATEN.permute.default, _call(ATEN.reshape.default, node, [n, h, w, c]), [0, 3, 1, 2])
    return _call(ATEN.reshape.default, node, list(like.shape))


def _with_nothing_of(moment: Node, gradient: Node) -> Node:
    """``gradient`` as it is, once ``moment``, a time after 1970, is known."""
    before = _call(ATEN.reshape.default, _call(ATEN.lt.Scalar, moment, 0), [])
    return _call(ATEN.add.Tensor, gradient, _converted(before, _value(gradient).dtype))


def _converted(node: Node, dtype: torch.dtype) -> Node:
    return node if _value(node).dtype == dtype else _call(torch.ops.prims.convert_element_type.default, node, dtype)


def _channels_last(value: Tensor) -> bool:
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def _value(node: Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _call(operator: Any, *args: Any) -> Node:
    """A node where the graph is being written, and what it would give."""
    nodes = [node for arg in args for node in (arg if isinstance(arg, list) else [arg]) if isinstance(node, Node)]
    node = nodes[0].graph.call_function(operator, args)
    with nodes[0].meta["val"].fake_mode:
        node.meta["val"] = operator(*map_arg(args, _value))
    return node
