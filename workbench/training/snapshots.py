"""Memory snapshots of a run: PyTorch's history of allocations, recorded for some steps on request, and when memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.allocator import storages
from workbench.distributed import World
from workbench.probes.holders import RunParts
from workbench.snapshots import Known, Mark, convert, write_snapshot

ENTRIES = 200_000
"""Most entries that a history keeps, the last ones: an allocation and its release are three."""

NONE_ON_A_CPU = (
    "A memory snapshot was asked for, and this run is on a CPU: PyTorch records the allocations of GPUs only. "
    "The memory readings tell who holds what here too."
)


class Snapshots:
    """Recorder of one rank. While nothing is recorded it costs nothing.

    Recording notes every allocation with its Python stack, about 2 µs each. Addresses of weights, gradients and state are noted
    once a step, on the host. The device is waited for by none of it.

    Args:
        folder: the run folder.
        world: this rank.
        parts: of the trainer.
        say: called with words where there is no history to record.
    """

    def __init__(self, folder: Path, world: World, parts: RunParts, say: Callable[[str], None]) -> None:
        self._folder, self._world, self._parts, self._say = folder / "snapshots", world, parts, say
        self._left = self._recorded = 0
        self._marks: list[Mark] = []
        self._known: list[Known] = []

    @property
    def recording(self) -> bool:
        """Whether allocations are being recorded, which makes steps slower."""
        return self._left > 0

    def ask(self, steps: int, step: int) -> None:
        """Record the ``steps`` that follow step ``step``; what is being recorded goes on."""
        if steps < 1 or self._left:
            return
        if self._world.device.type != "cuda":
            self._say(NONE_ON_A_CPU)
            return
        self._left, self._recorded = steps, 0
        self._marks, self._known = [], []
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=ENTRIES, clear_history=True)
        self._mark(step + 1, "between")

    @contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """Around each forward pass of step ``step``."""
        self._mark(step, "forward")
        yield
        self._mark(step, "backward")

    def computed(self, step: int) -> None:
        """The gradients of step ``step`` are there; the update follows."""
        if self._left:
            self._known.append(self._look())
            self._mark(step, "update")

    def after(self, step: int) -> None:
        """Step ``step`` has ended: write what was recorded, if that is all."""
        if not self._left:
            return
        self._mark(step + 1, "between")
        self._left, self._recorded = self._left - 1, self._recorded + 1
        if not self._left:
            self._write(step, "asked for")

    def failed(self, step: int) -> Path | None:
        """Memory ran out in the step after ``step``: keep what there is, the history too if it was being recorded."""
        if self._world.device.type != "cuda":
            return None
        with suppress(Exception):  # past helping: the first error is the one to tell
            return self._write(step + 1, "out of memory")
        return None

    def close(self) -> None:
        """Record no more."""
        if self._left:
            self._left = 0
            torch.cuda.memory._record_memory_history(None)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _mark(self, step: int, phase: str) -> None:
        if self._left:
            self._marks.append(Mark(time.time_ns() // 1000, step, phase))

    def _look(self) -> Known:
        return Known(time.time_ns() // 1000, _addresses(self._parts))

    def _write(self, step: int, reason: str) -> Path:
        device = self._world.device
        recorded = bool(self._marks)
        known = [*self._known, self._look()]
        raw = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(None)
        self._left = 0
        if not recorded:
            raw = {**raw, "device_traces": []}  # else those of an earlier history, if there was one
        facts: Mapping[str, Any] = {
            "step": step,
            "first": step - self._recorded + (reason == "asked for"),
            "rank": self._world.rank,
            "reason": reason,
            "recorded": recorded,
            "device": torch.cuda.get_device_name(device),
            "total": torch.cuda.get_device_properties(device).total_memory,
            "peak": torch.cuda.max_memory_allocated(device),
        }
        converted = convert(raw, device.index or 0, known=known, marks=self._marks, facts=facts)
        self._marks, self._known = [], []
        return write_snapshot(self._folder, f"step-{step}-rank-{self._world.rank}", raw, converted)


def _addresses(parts: RunParts) -> dict[int, str]:
    """Who holds which storages, by address; a storage is its first holder's."""
    found: dict[int, str] = {}

    def take(holder: str, tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                for storage in storages(tensor):
                    found.setdefault(storage.data_ptr(), holder)

    trained: nn.Module = parts.trained
    take("parameters", trained.parameters())
    take("buffers", trained.buffers())
    take("gradients", (p.grad for p in trained.parameters()))
    take("optimizer", (value for state in parts.optimizer.state.values() for value in state.values()))
    for holder, tensors in parts.named.items():
        take(holder, tensors())
    return found
