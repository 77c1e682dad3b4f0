"""What the compiler's graph of an objective's forward and backward pass is changed by, before it is parted into the two.

Imported only where models are compiled: it takes the compiler with it.
"""

from __future__ import annotations

import operator

from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from workbench.training.reduction import Averaging


class Passes(CustomGraphPass):
    """:func:`put_readings_off`, then ``averaging`` if there is any."""

    def __init__(self, averaging: Averaging | None) -> None:
        self._averaging = averaging

    def uuid(self) -> bytes:
        """What decides whether a graph compiled before can be used again."""
        files = (__file__, *([] if self._averaging is None else [self._averaging.file]))
        return bytes(get_hash_for_files(files)) + repr(self._averaging).encode()

    def __call__(self, graph: Graph) -> None:
        put_readings_off(graph)
        if self._averaging is not None:
            self._averaging(graph)


def put_readings_off(graph: Graph) -> None:
    """Each reading of a layer's output just before the next one, behind whatever uses that output.

    Between the two it keeps the partitioner from computing that use again in the backward pass, as it does for GELU, say, whose
    larger derivative is kept for it then.
    """
    readings = [node for node in graph.nodes if node.op == "call_function" and _reads(node)]
    for reading, following in zip(readings, readings[1:], strict=False):
        given = [user for user in reading.users if user.target is operator.getitem]
        for node in (reading, *given):
            following.prepend(node)


def _reads(node: Node) -> bool:
    # The operator's name: it is there only where there are probes.
    return node.target is auto_functionalized_v2 and str(node.args[0]) == "workbench.record.default"
