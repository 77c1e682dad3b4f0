"""What a step's time goes into on each rank: its own work, waits for samples, waits for other ranks and the wire."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from workbench.probes.base import Probe, StepContext, StepTiming
from workbench.probes.config import ProbeConfig
from workbench.probes.topology import Topology, find_topology


class CommunicationProbe(Probe):
    """By rank, one row a step read:

    * ``busy``: seconds of the rank's own work: update, input, forward and backward pass;
    * ``waited``: of these, seconds that the host waited for samples (on an accelerator hidden where the host runs ahead);
    * ``exposed``: seconds that it then waited for gradients: for slower ranks, and for what was still on the wire;
    * ``idle``: share of the last steps at whose begin the device had done all it was given: it waits for the host; not a number
      on a CPU;
    * ``payload``: bytes of gradients it gave to its peers, where copies exchange them;
    * ``bandwidth``: bytes per second that its link carried in an all-reduce when the run started;
    * ``network``: Gb/s of the slowest host's network interface; ``link``: how it reaches the next rank; ``hosts``: their number.

    Seconds are of the device's own clock; they are not a number for steps that follow no other: the first, and those after an
    evaluation, a checkpoint or a pause. With weights spread over ranks, waits within the passes count as work. A step that is
    read costs a hook and three events of the device, about 20 µs; others two events.
    """

    kind = "communication"
    timed = True

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self._timings: dict[int, StepTiming] = {}
        self._topology = Topology()

    def attach(self, model: nn.Module) -> Callable[[], None]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._topology = find_topology(device)
        self._carrier = torch.zeros(1, device=device)
        return lambda: None

    def read(self, context: StepContext) -> Tensor | None:
        """[1], nothing in itself: once it has come to the host, the step's moments are known there too."""
        if context.timing is not None:
            self._timings[context.step] = context.timing
        return self._carrier

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        timing, found = self._timings.pop(step, None), self._topology
        return {
            "step": [step],
            "busy": [math.nan if timing is None else timing.busy],
            "waited": [math.nan if timing is None else timing.waited],
            "exposed": [math.nan if timing is None else timing.exposed],
            "idle": [math.nan if timing is None else timing.idle],
            "payload": [0 if timing is None else timing.payload],
            "bandwidth": [math.nan if found.bandwidth is None else found.bandwidth],
            "network": [math.nan if found.network is None else found.network],
            "hosts": [found.hosts],
            "link": [found.link],
        }
