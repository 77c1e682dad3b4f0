"""Memory by rank: how much, and what holds it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn

from workbench.probes.base import Probe, StepContext
from workbench.probes.config import ProbeConfig
from workbench.probes.holders import HOLDERS, ByLayer, RunParts, gradient_bytes, take_census
from workbench.probes.layer_memory import watched

LAYERS = "memory_layers"
"""Kind of the readings by layer."""

WATCHED = 2
"""Readings whose forward pass is watched layer by layer: libraries allocate in the first what they keep for all."""

COMPILED = "(compiled)"
"""Layers of a compiled model, whose activations can't be told apart."""

_COUNTERS = ("allocated", "reserved", "peak", "total")
_FORWARD = ("forward", "accumulated", "activations")
_UNKNOWN = -1


class MemoryProbe(Probe):
    """Bytes in use by this rank: of the accelerator's allocator, or on a CPU of the process. One row a step read:

    * ``allocated`` after the backward pass and before the update, the same moment of every step (CPU: resident set);
      ``reserved`` by the allocator then, ``peak`` allocated so far, ``total`` of the device; where layers lie on several
      accelerators, the sums over them;
    * who holds ``allocated``: :data:`~workbench.probes.holders.HOLDERS`, sums of storages, and ``other``: the batch, workspaces
      of libraries, what the allocator adds to round up, on a CPU the interpreter and its libraries. They add up to it exactly;
    * ``forward``: allocated at the end of the step's fullest forward pass, the moment of most activations; ``activations`` of it:
      what the forward passes under way have added; ``accumulated`` of it: gradients of earlier micro-steps, or the buckets that
      gradients lie in. The other holders are what they are after the backward pass;
    * ``fragmentation``: share of ``reserved`` that is free within segments in use, so that only smaller blocks fit there; not a
      number on a CPU.

    On CUDA all are exact, eager or compiled: the allocator counts on the host, so nothing waits for the device. On a CPU
    ``activations`` are the storages that autograd saved in a first pass, eager only, and null where they are not known.

    The kind ``memory_layers`` has a row a layer with ``parameters``, ``gradients``, ``optimizer`` and ``activations``, written at
    the first reading and when it changes. Activations by layer are of the first :data:`WATCHED` readings (see
    :func:`~workbench.probes.layer_memory.watched`); of a compiled model they are one row, :data:`COMPILED`.

    A reading costs the host a look at every parameter, its gradient and its state: 10 to 20 µs a parameter.
    """

    kind = "memory"

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self._peak = 0
        self._parts: RunParts | None = None
        self._watching = 0
        self._by_layer: ByLayer | None = None
        self._flying: deque[int] = deque(maxlen=1)
        self._fullest: tuple[int, int, int] | None = None
        self._tables: dict[int, dict[str, Any]] = {}
        self._written: dict[str, Any] = {}

    def attach(self, model: nn.Module) -> Callable[[], None]:
        self._model = model
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._devices = list(dict.fromkeys(p.device for p in model.parameters() if p.is_cuda))
        self._process = psutil.Process()
        if self._devices:
            self._total = sum(torch.cuda.get_device_properties(device).total_memory for device in self._devices)
        else:
            self._total = psutil.virtual_memory().total
        return lambda: None

    def join(self, parts: RunParts) -> None:
        self._parts = parts
        self._flying = deque(maxlen=parts.flying)

    def arm(self) -> None:
        super().arm()
        self._fullest = None
        self._flying.clear()

    @contextmanager
    def forward(self) -> Iterator[None]:
        compiled = self._parts is not None and self._parts.compiled
        watching = self._watching < WATCHED and not compiled and self._fullest is None
        before = self._allocated()
        if watching:
            with watched(self._model, self._device) as found:
                yield
            self._watching += 1
            self._by_layer = found
        else:
            yield
        after = self._allocated()
        self._flying.append(after - before)
        # Of a CPU's forward passes the last: its resident set moves for many reasons.
        if self._fullest is None or after > self._fullest[0] or not self._devices:
            self._fullest = after, self._gradients(), self._activations()

    def read(self, context: StepContext) -> Tensor | None:
        """int64 [counters, holders, free in pieces, forward]: see :meth:`table`; on the host."""
        counters, pieces = self._counters()
        held, by_layer = take_census(self._model, self._device, self._parts)
        self._tables[context.step] = self._layers(by_layer)
        fullest = self._fullest or (_UNKNOWN,) * len(_FORWARD)
        return torch.tensor([*counters, *held.values(), pieces, *fullest])

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        names = (*_COUNTERS, *HOLDERS, "pieces", *_FORWARD)
        found: dict[str, int | float | None] = {name: int(value) for name, value in zip(names, values, strict=True)}
        pieces, reserved = int(values[names.index("pieces")]), int(values[1])
        del found["pieces"]
        found["other"] = int(values[0]) - sum(int(values[names.index(name)]) for name in HOLDERS)
        found["fragmentation"] = pieces / reserved if pieces != _UNKNOWN and reserved else float("nan")
        return {"step": [step], **{name: _column(name, value) for name, value in found.items()}}

    def tables(self, step: int, values: npt.NDArray[Any]) -> dict[str, dict[str, Any]]:
        layers = self._tables.pop(step)
        found = {self.kind: self.table(step, values)}
        if layers["layer"] and layers != self._written:
            self._written = layers
            found[LAYERS] = {"step": [step] * len(layers["layer"]), **layers}
        return found

    # -- the counters -------------------------------------------------------------------------------------------------

    def _allocated(self) -> int:
        if self._devices:
            return sum(map(torch.cuda.memory_allocated, self._devices))
        return int(self._process.memory_info().rss)

    def _counters(self) -> tuple[tuple[int, int, int, int], int]:
        """Allocated, reserved, peak, total; bytes that are free within segments in use."""
        if self._devices:
            stats = [torch.cuda.memory_stats_as_nested_dict(device) for device in self._devices]
            now, reserved, pieces = (
                sum(of[name]["all"]["current"] for of in stats)
                for name in ("allocated_bytes", "reserved_bytes", "inactive_split_bytes")
            )
            return (now, reserved, sum(of["allocated_bytes"]["all"]["peak"] for of in stats), self._total), pieces
        now = self._allocated()
        self._peak = max(self._peak, now)
        return (now, now, self._peak, self._total), _UNKNOWN

    def _gradients(self) -> int:
        if self._parts is None:
            return gradient_bytes(self._model, self._device)
        return self._parts.buckets if self._parts.views else gradient_bytes(self._parts.trained, self._device)

    def _activations(self) -> int:
        if self._device.type == "cuda":
            return sum(self._flying)
        return _UNKNOWN if self._by_layer is None else sum(self._by_layer.values()) * len(self._flying)

    # -- by layer -----------------------------------------------------------------------------------------------------

    def _layers(self, by_layer: dict[str, ByLayer]) -> dict[str, Any]:
        activations = self._by_layer
        if activations is None and self._fullest is not None and self._fullest[2] != _UNKNOWN:
            activations = {COMPILED: self._fullest[2]}
        columns = {**by_layer, "activations": activations or {}}
        known = {name for layers in columns.values() for name, held in layers.items() if held and self._wants_layer(name)}
        modules = [name for name, _ in self._model.named_modules() if name in known]
        names = [*modules, *sorted(known.difference(modules))]
        root = type(self._model).__name__
        unknown = None if activations is None or COMPILED in activations else 0
        found: dict[str, Any] = {"layer": [name or root for name in names]}
        for holder, layers in columns.items():
            missing = unknown if holder == "activations" else 0
            found[holder] = [layers.get(name, missing) for name in names]
        return found

    def _wants_layer(self, name: str) -> bool:
        return name.startswith("(") or self.wants(name)


def _column(name: str, value: int | float | None) -> Any:
    """A column of one row; null where a figure of the forward pass is not known."""
    import pyarrow as pa

    if name not in _FORWARD:
        return [value]
    return pa.array([None if value == _UNKNOWN else value], type=pa.int64())
