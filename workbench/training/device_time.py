"""Moments within what is compiled or captured, where events can't be recorded anew: read from the device's own clock.

:func:`stamp` writes the time when the device comes to it; :func:`mark` is one operator of a compiled graph that does so, into
:func:`marked`. :func:`moments` brings such times to the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workbench.probes.base import Moment, Stamp


@cache
def marked(device: torch.device) -> Tensor:
    """int64 [1] on ``device``: when it last came to a :func:`mark`."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def stamp(out: Tensor) -> None:
    """Write the device's time in nanoseconds into ``out``, int64 [1]."""
    if out.is_cuda:
        with torch.cuda.device_of(out):
            _kernel()[(1,)](out)
    else:
        out.fill_(time.perf_counter_ns())


@torch.library.custom_op("workbench::mark", mutates_args=())
def mark(value: Tensor) -> Tensor:
    """The time at which the device comes to it, which is once ``value`` is computed; noted in :func:`marked` too."""
    now = torch.empty_like(marked(value.device))
    stamp(now)
    marked(value.device).copy_(now)
    return now


@mark.register_fake
def _(value: Tensor) -> Tensor:
    return value.new_empty(1, dtype=torch.int64)


def moments(*stamps: Tensor) -> Iterator[Moment]:
    """Of ``stamps`` (int64 [1] each, on one device), without waiting for it."""
    together = torch.cat(stamps)
    if not together.is_cuda:
        return iter([nanoseconds / 1e9 for nanoseconds in together.tolist()])
    host = torch.empty(len(stamps), dtype=torch.int64, pin_memory=True)
    host.copy_(together, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return (Stamp(host, place, copied) for place in range(len(stamps)))


@cache
def _kernel() -> Any:
    """Triton is imported on first use: it comes with CUDA builds only."""
    from workbench.training.stamp_kernel import stamp

    return stamp
