"""Arithmetic of the step: autocast, loss scaling, tf32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """How one precision computes a step.

    Args:
        name: ``fp32``, ``tf32``, ``fp16`` or ``bf16``. Weights and optimizer state are fp32 in all of them.
        device: of the step.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.dtype = AUTOCAST.get(name, torch.float32)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
        # Only fp16 needs its loss scaled: its smallest normal number is 6e-5, bf16's is fp32's.
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        if self.name not in AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    @property
    def scale(self) -> Tensor | None:
        """Factor by which gradients are too large, on the device; None without loss scaling."""
        return self.scaler._scale if self.scaler.is_enabled() else None

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()
