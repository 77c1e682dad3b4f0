"""Copies of an objective on several ranks that compute and exchange gradients in one compiled graph."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.training.communication import payload
from workbench.training.communication_config import CommunicationConfig
from workbench.training.compilation import compile_whole
from workbench.training.device_time import marked
from workbench.training.objective import Objective
from workbench.training.parallel import Parallel, Replicated
from workbench.training.reduction import Averaging


class CompiledReplicas(Parallel):
    """A copy on every rank; gradients are averaged within the compiled backward pass (:mod:`workbench.training.reduction`).

    The whole objective has to become one graph: what stayed outside would learn from its own rank's samples only. If it does not,
    the first step shows it, and DDP exchanges the gradients of what can be compiled (:class:`Replicated`).
    """

    def __init__(
        self, objective: Objective, mode: str, communication: CommunicationConfig, world: World, deterministic: bool
    ) -> None:
        super().__init__(objective)
        self._mode, self._communication, self._world, self._deterministic = mode, communication, world, deterministic
        self._plain: Replicated | None = None
        constants = set(objective.constants)
        for name, tensor in (*objective.named_parameters(), *objective.named_buffers()):
            if name not in constants:
                dist.broadcast(tensor.detach(), src=0)
        # Running statistics are not what a training step computes with: each rank keeps its own until they are asked for.
        apart = {
            id(b) for part in objective.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) for b in part.buffers()
        }
        buffers = [buffer for name, buffer in objective.named_buffers() if name not in constants and id(buffer) not in apart]
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.payload, self.marked = payload(objective, communication, None), marked(next(objective.parameters()).device)
        compile_whole(objective, mode, self._averaging())
        self.forward = self._first

    def _averaging(self) -> Averaging:
        group, bucket = dist.group.WORLD, self._communication.bucket
        assert group is not None
        wire = torch.bfloat16 if self._communication.compress == "bf16" else None
        return Averaging(group.group_name, self._world.size, math.inf if bucket == "whole" else float(bucket), wire)

    def _first(self, x: Any, y: Any) -> Tensor:
        try:
            loss = self._compute(x, y)
        except Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            logging.getLogger(__name__).warning("Not one graph (%s): DDP exchanges gradients after what is compiled.", reason)
            self._fall_back()
            return self.forward(x, y)
        self.forward = self._compute
        return loss

    def _fall_back(self) -> None:
        compile_whole(self.objective, self._mode)
        self._plain = plain = Replicated(self.objective, self._communication, self._world, self._deterministic)
        self.forward, self.marked, self.buckets, self.views = plain.forward, None, plain.buckets, plain.views

    def _compute(self, x: Any, y: Any) -> Tensor:
        for buffer in self._buffers:
            dist.broadcast(buffer, src=0)
        try:
            loss: Tensor = self.objective(x, y)
        except FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"compile={self._mode!r}: the model has been compiled too often, for batches of too many shapes.",
                "Set data.pad_to so that shapes repeat, or compile=off.",
            ) from error
        return loss
