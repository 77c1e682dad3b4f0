"""A memory config put into effect on a model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from workbench.errors import ConfigError
from workbench.training.checkpointing import recompute_blocks
from workbench.training.memory_config import MemoryConfig
from workbench.training.offload import ActivationOffload, offload_state


class Economy:
    """What saves memory in a run's steps, until undone.

    Args:
        memory: nothing in it is auto any more.
        model: whose blocks compute again; changed in place.
        optimizer: whose state may wait in main memory.
    """

    def __init__(self, memory: MemoryConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert memory.recompute != "auto" and memory.offload != "auto"
        self._undo = recompute_blocks(model, memory.recompute)
        self._undo_state: Callable[[], None] = lambda: None
        self._offload = ActivationOffload() if memory.offload in ("activations", "both") else None
        if memory.offload in ("optimizer", "both"):
            self._undo_state = offload_state(optimizer)

    def forward(self) -> AbstractContextManager[Any]:
        """Around the forward pass of a micro-step."""
        return self._offload.forward() if self._offload is not None else nullcontext()

    def undo(self, *, state: bool = True) -> None:
        """Leave the model as it was, and, if ``state``, the optimizer's on the device."""
        self._undo()
        if state:
            self._undo_state()


def check_memory(memory: MemoryConfig, device: torch.device, compile_mode: str, *, sharded: bool = False) -> None:
    """Refuse what cannot save memory here; ``sharded``: no rank holds a whole model.

    Raises:
        ConfigError: tensors to offload on a CPU, or out of captured graphs; or what ranks with shards can't do.
    """
    if memory.offload not in ("none", "auto") and device.type == "cpu":
        raise ConfigError(
            f"memory.offload={memory.offload!r} moves tensors from a GPU to main memory, and this run is on a CPU.",
            "Set memory.offload=none; memory.recompute and accumulate save memory on a CPU too.",
        )
    if memory.offload in ("activations", "both") and compile_mode in ("reduce-overhead", "max-autotune"):
        raise ConfigError(
            f"memory.offload={memory.offload!r} gives activations' memory back, and compile={compile_mode!r} captures graphs "
            "whose memory is fixed.",
            "Take compile=default or off, or memory.recompute, which captured graphs can do.",
        )
    if sharded and memory.offload in ("optimizer", "both"):
        raise ConfigError(
            f"memory.offload={memory.offload!r} moves whole state, and this mesh has spread it over ranks.",
            "Set memory.offload=none or activations, or spread it over more ranks.",
        )
    if sharded and "auto" in (memory.recompute, memory.offload):
        raise ConfigError(
            "memory: auto measures steps of a whole model on a rank, and on this mesh no rank holds one.",
            "Set memory.recompute to a share of the blocks, e.g. 1, and memory.offload to none or activations.",
        )
