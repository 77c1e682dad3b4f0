"""Memory by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn

from workbench.probes.base import Probe, StepContext
from workbench.probes.config import ProbeConfig


class MemoryProbe(Probe):
    """Bytes in use by this rank: the accelerator's allocator, or on a CPU the process.

    ``allocated`` (CPU: resident set), ``reserved`` by the allocator, ``peak`` allocated so far, ``total`` of the device. Where
    layers lie on several accelerators, the sums over them. Read on the host from the allocator's own counters, at no cost to the
    device.
    """

    kind = "memory"

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self._peak = 0

    def attach(self, model: nn.Module) -> Callable[[], None]:
        self._devices = list(dict.fromkeys(p.device for p in model.parameters() if p.is_cuda))
        self._process = psutil.Process()
        if self._devices:
            self._total = sum(torch.cuda.get_device_properties(device).total_memory for device in self._devices)
        else:
            self._total = psutil.virtual_memory().total
        return lambda: None

    def read(self, context: StepContext) -> Tensor | None:
        """int64 [4]: allocated, reserved, peak, total."""
        if self._devices:
            allocated, reserved, self._peak = (
                sum(map(count, self._devices))
                for count in (torch.cuda.memory_allocated, torch.cuda.memory_reserved, torch.cuda.max_memory_allocated)
            )
        else:
            allocated = reserved = self._process.memory_info().rss
            self._peak = max(self._peak, allocated)
        return torch.tensor([allocated, reserved, self._peak, self._total])

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        names = ("allocated", "reserved", "peak", "total")
        return {"step": [step], **{name: [int(value)] for name, value in zip(names, values, strict=True)}}
