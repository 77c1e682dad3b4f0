"""What a probe is, and the bins that all histograms share.

A probe reads on some steps. It leaves a small tensor on the device, before or after the update of the weights;
:class:`workbench.probes.ProbeSet` brings it to the host by one asynchronous copy and hands it back to :meth:`Probe.table`. A new
probe is one class under one name in ``PROBES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from workbench.probes.bins import Bins
from workbench.probes.config import ProbeConfig

if TYPE_CHECKING:
    from workbench.probes.holders import RunParts

ACTIVATIONS = Bins(-24, 16, per_octave=2, signed=True)
"""Of layers' outputs: ± 2^(k/2) from 2^-24, the smallest number of fp16, to 2^16, beyond its largest, and ± infinity."""

GRADIENTS = Bins(-48, 16)
"""Of gradients' magnitudes: octaves from 2^-48 to 2^16."""

EDGES = ACTIVATIONS.edges
"""Edges of the activations' bins. The middle bin holds what is closer to zero. Fixed for all layers, steps and ranks, so that
counts merge by addition."""


class Stamp:
    """A moment of a device's own clock, on its way to the host.

    Args:
        nanoseconds: int64, in pinned memory, of several moments; ``place`` in it.
        copied: the device reaches it when they have come.
    """

    def __init__(self, nanoseconds: Tensor, place: int, copied: torch.cuda.Event) -> None:
        self._nanoseconds, self._place, self._copied = nanoseconds, place, copied

    def query(self) -> bool:
        return self._copied.query()

    def since(self, earlier: Stamp) -> float:
        """Seconds from ``earlier``, of the same device."""
        return (self._at() - earlier._at()) / 1e9

    def _at(self) -> int:
        return int(self._nanoseconds[self._place])


Moment = float | torch.cuda.Event | Stamp
"""Seconds of the wall clock, or what the device has yet to reach."""


@dataclass(frozen=True)
class StepTiming:
    """When what happened in a step on this rank.

    Attributes:
        began: the gradients of the step before had come from all ranks.
        ready: this rank's own gradients were computed.
        gathered: those of all ranks had come.
        waited: seconds that the host waited for samples.
        payload: bytes of gradients that the rank gave to its peers.
        idle: share of the last steps at whose begin the device had nothing left to do; not a number on a CPU.
    """

    began: Moment
    ready: Moment
    gathered: Moment
    waited: float = 0.0
    payload: int = 0
    idle: float = math.nan

    def arrived(self) -> bool:
        """Whether the device has reached the last of these moments."""
        return True if isinstance(self.gathered, float) else self.gathered.query()

    @property
    def busy(self) -> float:
        """Seconds of the rank's own work, the wait for samples included; to be asked for once it has arrived."""
        return seconds_between(self.began, self.ready)

    @property
    def exposed(self) -> float:
        """Seconds that it then waited for peers and for what was on the wire."""
        return seconds_between(self.ready, self.gathered)


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds from one moment to another of its kind."""
    match start, end:
        case float(), float():
            return end - start
        case Stamp(), Stamp():
            return end.since(start)
        case torch.cuda.Event(), torch.cuda.Event():
            return start.elapsed_time(end) / 1000
    raise TypeError(f"No time passes between moments of two clocks, {type(start).__name__} and {type(end).__name__}.")


@dataclass(frozen=True)
class StepContext:
    """What a probe may need of the step it reads.

    Attributes:
        step: optimizer steps completed once this one is.
        scale: factor by which gradients are too large (loss scaling), a scalar tensor, or None.
        timing: when what happened, on steps that a probe with :attr:`Probe.timed` reads; None where steps can't be timed.
    """

    step: int
    scale: Tensor | None = None
    timing: StepTiming | None = None


class Probe:
    """Base of probes.

    Args:
        config: how often, and which layers.
    """

    kind: str = ""
    timed = False
    """Whether it wants to know when what happened in the steps it reads."""

    def __init__(self, config: ProbeConfig) -> None:
        self.config = config
        self.armed = False
        self.computes: Callable[[str], bool] = lambda layer: True
        """Whether a layer is computed by this rank."""

    def wants(self, name: str, module: nn.Module | None = None) -> bool:
        """Whether the filters take the layer ``name``; that of kinds is of modules."""
        kind = type(module).__name__
        return (
            self.computes(name)
            and any(fnmatchcase(name, pattern.strip()) for pattern in self.config.layers.split(","))
            and (module is None or any(fnmatchcase(kind, pattern.strip()) for pattern in self.config.kinds.split(",")))
        )

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Hook into the model, before it is compiled or wrapped; returns the detach."""
        return lambda: None

    def join(self, parts: RunParts) -> None:
        """The trainer is complete, and this is what it is made of."""

    def arm(self) -> None:
        """The coming step is to be read."""
        self.armed = True

    def forward(self) -> AbstractContextManager[Any]:
        """Around each forward pass, loss included, of a step that is read; outside of what is compiled."""
        return nullcontext()

    def read(self, context: StepContext) -> Tensor | None:
        """After the backward pass, before the update: what was read, on the device; None when there is nothing."""
        return None

    def updated(self, context: StepContext) -> Tensor | None:
        """After the update of the weights, gradients still there: what was read, if :meth:`read` had nothing yet."""
        return None

    def table(self, step: int, values: npt.NDArray[Any]) -> dict[str, Any]:
        """Columns of the readings, from the host's copy of what :meth:`read` or :meth:`updated` gave."""
        raise NotImplementedError(f"{type(self).__name__} must say how its readings are tabled.")

    def tables(self, step: int, values: npt.NDArray[Any]) -> dict[str, dict[str, Any]]:
        """Tables by kind, where there is more to write than one."""
        return {self.kind: self.table(step, values)}


def computing_again() -> bool:
    """Whether a layer computes within a backward pass, again, because its activations were not kept: hooks on it have run."""
    # A compiled graph is traced once, and holds what a hook does once.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def host_array(value: Tensor) -> npt.NDArray[Any]:
    return np.asarray(value.detach().cpu() if value.device.type != "cpu" else value.detach())
