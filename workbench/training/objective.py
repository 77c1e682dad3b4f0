"""What training minimizes, as one module: it is compiled, captured and wrapped as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.distributed import whole
from workbench.regularizers import PENALTIES
from workbench.training.distillation import Distillation


class Objective(nn.Module):
    """Model, loss, teacher and penalties.

    The loss that a run reports for its steps is this one, all parts included; evaluation is of the plain loss.

    Args:
        loss: from (output, target) to the mean over the batch.
        penalties: factors by name in :data:`~workbench.regularizers.PENALTIES`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any],
        penalties: Mapping[str, float] | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.distillation = model, loss, distillation
        self._penalties = [(PENALTIES.factory(name), factor) for name, factor in (penalties or {}).items() if factor]
        for penalty, _ in self._penalties:  # one that does not fit says so before training
            penalty(model)

    def forward(self, x: Any, y: Any) -> Tensor:
        """Batch (x, y) -> what is to be minimized, a scalar."""
        output = self.model(x)
        value: Tensor = self.loss(output, y)
        if self.distillation is not None:
            value = self.distillation(x, output, value)
        if self._penalties:
            with torch.autocast(value.device.type, enabled=False), torch.autocast("cpu", enabled=False):
                for penalty, factor in self._penalties:
                    value = value + factor * whole(penalty(self.model)).to(value.device)
        return value

    def detach(self) -> None:
        """Leave the model as it was: no hooks."""
        if self.distillation is not None:
            self.distillation.detach()

    @property
    def trained(self) -> nn.Module:
        """What the optimizer updates and a checkpoint holds: the model, and with it whatever the terms learn."""
        terms = self.distillation.layers if self.distillation is not None else None
        if terms is None or not any(True for _ in terms.parameters()):
            return self.model
        return nn.ModuleDict({"model": self.model, "terms": terms})

    @property
    def constants(self) -> list[str]:
        """Names of the teacher's parameters and buffers, which ranks need not exchange."""
        if self.distillation is None:
            return []
        teacher = self.distillation.teacher
        tensors = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
        return [f"distillation.teacher.{name}" for name in tensors]
