"""When a rank's own work of a step was done, and when the gradients of all ranks had come; nothing waits for the device.

:class:`StepClock` gives a :class:`~workbench.probes.base.StepTiming` for each step that is watched. Balance and the
communication probe read them.
"""

from __future__ import annotations

import math
import time
from collections import deque

import torch
from torch import Tensor
from torch.autograd import Variable

from workbench.data.batches import Batches
from workbench.probes.base import Moment, StepTiming
from workbench.training.device_time import moments, stamp
from workbench.training.parallel import Parallel

LOOKS = 20
"""Steps over which the device's idleness is told."""


class StepClock:
    """Moments of this rank's steps: CUDA events on the stream that computes, wall clock on a CPU; where a compiled backward pass
    exchanges gradients itself, the device's own time, on both.

    A step's time is counted from the moment at which the gradients of the step before had come. What follows, up to the moment
    at which this rank's own gradients are computed, is its own work: the update, the wait for samples, forward and backward pass.
    From there on it waits for what its peers still compute and for what is still on the wire.

    Args:
        device: that computes.
        batches: whose waits for samples are counted.
        parallel: whose backward passes are timed, and what it sends.
    """

    def __init__(self, device: torch.device, batches: Batches, parallel: Parallel) -> None:
        self._device, self._batches, self._parallel = device, batches, parallel
        self._began: Moment | Tensor | None = None
        self._ready: Moment | Tensor | None = None
        self._waited = 0.0
        self._given: torch.cuda.Event | None = None
        self._idle: deque[bool] = deque(maxlen=LOOKS)

    def start(self) -> None:
        """Steps follow one another from here: training starts, or goes on after something else."""
        self._began = None
        self._given = None

    def begin(self) -> None:
        """The host is about to give the device a step: look whether it has yet to finish the one before."""
        if self._given is not None:
            self._idle.append(self._given.query())

    def end(self) -> None:
        """The host has given the device all of a step."""
        if self._device.type == "cuda":
            self._given = self._given or torch.cuda.Event()
            self._given.record()

    @property
    def idle(self) -> float:
        """Share of the last steps that found the device idle; not a number where none was looked at."""
        return sum(self._idle) / len(self._idle) if self._idle else math.nan

    def watch(self, loss: Tensor) -> Tensor:
        """``loss`` as it is; its backward pass will note when this rank's part is computed, before it waits for others."""
        if self._parallel.marked is None:
            loss.register_hook(self._queue)
        else:
            self._ready = self._parallel.marked
        return loss

    def _queue(self, gradient: Tensor) -> None:
        # Callbacks run in the order in which they were queued, on the stream that called backward. This one is queued when the
        # pass begins; DDP's, which waits for the peers, when the last gradients are ready.
        Variable._execution_engine.queue_callback(self._mark_ready)

    def _mark_ready(self) -> None:
        self._ready = self._now()

    def gathered(self) -> StepTiming | None:
        """After a step's backward pass: its timing, if it was watched and directly follows another step."""
        now, waited = self._now(), self._batches.waited
        began, ready, before = self._began, self._ready, self._waited
        self._began, self._ready, self._waited = now, None, waited
        if began is None or ready is None:
            return None
        if isinstance(began, Tensor) and isinstance(ready, Tensor) and isinstance(now, Tensor):
            began, ready, now = moments(began, ready, now)
        if isinstance(began, Tensor) or isinstance(ready, Tensor) or isinstance(now, Tensor):
            return None  # of two clocks
        return StepTiming(began, ready, now, waited - before, self._parallel.payload, self.idle)

    def _now(self) -> Moment | Tensor:
        if self._parallel.marked is not None:
            stamp(now := torch.empty_like(self._parallel.marked))
            return now
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
