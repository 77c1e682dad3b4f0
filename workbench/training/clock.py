"""When a rank's own work of a step was done, and when the gradients of all ranks had come; nothing waits for the device.

:class:`StepClock` gives a :class:`~workbench.probes.base.StepTiming` for each step that is watched. Balance and the
communication probe read them.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.autograd import Variable

from workbench.data.batches import Batches
from workbench.probes.base import Moment, StepTiming


class StepClock:
    """Moments of this rank's steps: CUDA events on the stream that computes, wall clock on a CPU.

    A step's time is counted from the moment at which the gradients of the step before had come. What follows, up to the moment
    at which this rank's own gradients are computed, is its own work: the update, the wait for samples, forward and backward pass.
    From there on it waits for what its peers still compute and for what is still on the wire.

    Args:
        device: that computes.
        batches: whose waits for samples are counted.
        payload: bytes of gradients that a rank gives to its peers each step.
    """

    def __init__(self, device: torch.device, batches: Batches, payload: int = 0) -> None:
        self._device, self._batches, self._payload = device, batches, payload
        self._began: Moment | None = None
        self._ready: Moment | None = None
        self._waited = 0.0

    def start(self) -> None:
        """Steps follow one another from here: training starts, or goes on after something else."""
        self._began = None

    def watch(self, loss: Tensor) -> Tensor:
        """``loss`` as it is; its backward pass will note when this rank's part is computed, before it waits for others."""
        loss.register_hook(self._queue)
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
        return StepTiming(began, ready, now, waited - before, self._payload)

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
