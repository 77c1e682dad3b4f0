"""Calls on CUDA devices replayed as one graph: the host says "go" once, however many kernels a call has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_WARM_UP = 3
"""Calls before capturing: the first compiles, and libraries choose their kernels and workspaces."""


@dataclass
class _Graph:
    """A captured call, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    output: Any


class Captured:
    """A function of one CUDA tensor whose calls are captured, a graph for each shape, type and layout of the input.

    Calling through graphs costs the host the same few microseconds for a model of any size, and whatever stands between the
    caller and the kernels (guards of compiled code, wrapped tensors) is passed once. The outputs are copies of their own.

    Args:
        call: must do the same work each time, on the device alone, without gradients.

    Raises:
        RuntimeError: at the first call, ``call`` waits for the device or copies from the host, which no graph can hold.
    """

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        self.call = call
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def __call__(self, x: Tensor) -> Any:
        key = (x.shape, x.dtype, x.stride(), x.device)
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(x)
        captured.x.copy_(x)
        captured.graph.replay()
        return tree_map_only(Tensor, torch.clone, captured.output)

    def _capture(self, x: Tensor) -> _Graph:
        with torch.cuda.device(x.device):
            static = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self.call(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.call(static)
            return _Graph(graph, static, output)
