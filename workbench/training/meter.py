"""Losses of every step, without a host sync on any.

Losses of a window of steps gather in a tensor on the device. At the window's end it is averaged over ranks and copied to the
host asynchronously; it is read once it has arrived, at the latest when the next window ends. So the host runs at most a
window ahead of the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.distributed import World, mean_over_ranks

PATIENCE = 0.4
"""Seconds after which a window is closed though it is not full."""


@dataclass
class Window:
    """Consecutive optimizer steps of one epoch."""

    first: int
    epoch: int
    rates: list[float] = field(default_factory=list)
    host: Tensor | None = None
    done: torch.cuda.Event | None = None
    seconds: float | None = None

    @property
    def last(self) -> int:
        return self.first + len(self.rates) - 1

    def arrived(self) -> bool:
        """Whether the losses are on the host."""
        return self.done is None or self.done.query()


class Meter:
    """Collects losses.

    Args:
        size: steps per window.
        report: called with (window, losses) once a window has arrived.
    """

    def __init__(self, size: int, world: World, report: Callable[[Window, list[float]], None]) -> None:
        self._size, self._world, self._report = size, world, report
        self._losses = torch.zeros(size, device=world.device)
        self._window: Window | None = None
        self._on_the_way: Window | None = None
        self._last_closed: float | torch.cuda.Event | None = None
        self._started: float | torch.cuda.Event | None = None
        self._ended: float | torch.cuda.Event = 0.0
        self._closed_at = time.perf_counter()

    def start(self) -> None:
        """Measure time from here: training starts, or goes on after something else."""
        self._last_closed = self._now()

    def add(self, step: int, epoch: int, rate: float, loss: Tensor) -> None:
        """The loss of optimizer step ``step``: this rank's mean, a scalar tensor."""
        if self._window is None:
            self._window = Window(step, epoch)
        self._losses[len(self._window.rates)].copy_(loss.detach(), non_blocking=True)
        self._window.rates.append(rate)
        # Slow steps are reported as they come. Only alone: peers must agree on the window, and their clocks may not.
        slow = self._world.size == 1 and time.perf_counter() - self._closed_at > PATIENCE
        if len(self._window.rates) == self._size or slow:
            self.close_window()
        elif self._on_the_way is not None and self._on_the_way.arrived():
            self.collect()

    def close_window(self) -> None:
        """Send the window on its way to the host; the one before is reported."""
        window, self._window = self._window, None
        if window is None:
            return
        values = mean_over_ranks(self._losses[: len(window.rates)].clone(), self._world)
        now = self._now()
        if isinstance(now, torch.cuda.Event):
            window.host = torch.empty(values.shape, pin_memory=True)
            window.host.copy_(values, non_blocking=True)
            window.done = torch.cuda.Event()
            window.done.record()
        else:
            window.host = values
        started, self._last_closed = self._last_closed, now
        self.collect()
        self._on_the_way, self._started, self._ended = window, started, now
        self._closed_at = time.perf_counter()
        if window.arrived():
            self.collect()

    def collect(self) -> None:
        """Report the window on its way, waiting for it if need be."""
        window, self._on_the_way = self._on_the_way, None
        if window is None:
            return
        assert window.host is not None
        if window.done is not None:
            window.done.synchronize()
        window.seconds = _elapsed(self._started, self._ended)
        self._report(window, window.host.tolist())

    def flush(self) -> None:
        """Report everything up to the present step."""
        self.close_window()
        self.collect()

    def _now(self) -> float | torch.cuda.Event:
        if self._world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(start: float | torch.cuda.Event | None, end: float | torch.cuda.Event) -> float | None:
    if start is None:
        return None
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - start
