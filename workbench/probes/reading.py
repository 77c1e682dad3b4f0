"""Reading probes without waiting: attached to a model, armed on the steps that are read, brought to the host as they arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.probes.base import Probe, StepContext, host_array

if TYPE_CHECKING:
    from workbench.probes.holders import RunParts

Deliver = Callable[[str, int, dict[str, Any]], None]


class ProbeSet:
    """The probes of one rank.

    Args:
        probes: by name, each with the number of steps between its readings (0 never).
        deliver: called with (kind, step, columns) for each reading that has arrived.
    """

    def __init__(self, probes: dict[str, tuple[Probe, int]], deliver: Deliver) -> None:
        self._probes = {name: probe for name, (probe, every) in probes.items() if every > 0}
        self.every = {name: every for name, (_, every) in probes.items() if every > 0}
        """Steps between the readings of each probe, by name."""
        self._deliver = deliver
        self._due: list[Probe] = []
        self._context = StepContext(0)
        self._on_the_way: deque[tuple[Probe, int, Tensor, torch.cuda.Event | None]] = deque()
        self._detach: list[Callable[[], None]] = []

    def attach(self, model: nn.Module, computes: Callable[[str], bool] | None = None) -> None:
        """Hook all probes into the model; do so before it is compiled or wrapped.

        Args:
            computes: whether a layer is computed by this rank, by name; by default, all are.
        """
        for probe in self._probes.values():
            probe.computes = computes or probe.computes
        self._detach = [probe.attach(model) for probe in self._probes.values()]

    def join(self, parts: RunParts) -> None:
        """What the trainer is made of, once it is complete."""
        for probe in self._probes.values():
            probe.join(parts)

    def detach(self) -> None:
        for detach in self._detach:
            detach()
        self._detach.clear()

    def due(self, step: int) -> list[str]:
        """Names of the probes that read the step numbered ``step``, from 1. The first is always read."""
        return [name for name, every in self.every.items() if step == 1 or step % every == 0]

    def begin(self, step: int, *, leave_out: bool = False) -> None:
        """The step numbered ``step`` is about to run; with ``leave_out`` unread."""
        self._due = [] if leave_out else [self._probes[name] for name in self.due(step)]
        for probe in self._due:
            probe.arm()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass of the present step."""
        with ExitStack() as stack:
            for probe in self._due:
                stack.enter_context(probe.forward())
            yield

    @property
    def timed(self) -> bool:
        """Whether the present step is to be timed."""
        return any(probe.timed for probe in self._due)

    def read(self, context: StepContext) -> None:
        """After the backward pass: start the readings of this step on their way to the host."""
        self._context = context
        for probe in self._due:
            self._send(probe, probe.read(context), context.step)

    def updated(self) -> None:
        """After the update of the weights, with the gradients still there; then deliver what has arrived."""
        for probe in self._due:
            self._send(probe, probe.updated(self._context), self._context.step)
        self._due = []
        self.collect()

    def _send(self, probe: Probe, value: Tensor | None, step: int) -> None:
        if value is None:
            return
        if not value.is_cuda:
            self._on_the_way.append((probe, step, value, None))
            return
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._on_the_way.append((probe, step, host, arrived))

    def collect(self, *, wait: bool = False) -> None:
        """Deliver what has arrived; with ``wait``, everything."""
        while self._on_the_way:
            probe, step, host, arrived = self._on_the_way[0]
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():
                    return
            self._on_the_way.popleft()
            for kind, columns in probe.tables(step, host_array(host)).items():
                self._deliver(kind, step, columns)
