"""Arithmetic of the step: autocast, FP8 layers, loss scaling, tf32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from workbench.data.batches import Batches
from workbench.training import fp8
from workbench.training.decisions import Decisions

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class Precision:
    """How one precision computes a step.

    Args:
        name: ``fp32``, ``tf32``, ``fp16``, ``bf16`` or ``fp8``. Weights and optimizer state are fp32 in all of them.
        device: of the step.
        others: that some of its layers lie on.
    """

    def __init__(self, name: str, device: torch.device, *others: torch.device) -> None:
        self.name, self.device = name, device
        self._kinds = list(dict.fromkeys(each.type for each in (device, *others)))
        self.dtype = AUTOCAST.get(name, torch.float32)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
        # Only fp16 needs its loss scaled: its smallest normal number is 6e-5, bf16's is fp32's.
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self._undo: Callable[[], None] = lambda: None

    def convert(self, choice: fp8.Choice) -> None:
        """Let the layers of ``choice`` multiply in FP8, if that is the precision, until :meth:`release`."""
        if self.name == "fp8":
            self._undo = fp8.convert(choice.layers.values())

    def release(self) -> None:
        """Leave the model as it was: of ordinary layers."""
        self._undo()

    def autocast(self) -> AbstractContextManager[object]:
        if self.name not in AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype) if len(self._kinds) == 1 else self._autocast_on_all()

    @contextmanager
    def _autocast_on_all(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind in self._kinds:
                stack.enter_context(torch.autocast(kind, dtype=self.dtype))
            yield

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    @property
    def scale(self) -> Tensor | None:
        """Factor by which gradients are too large, on the device; None without loss scaling."""
        return self.scaler._scale if self.scaler.is_enabled() else None

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()


def layers_for_fp8(model: nn.Module, batches: Batches, precision: Precision) -> fp8.Choice:
    """The layers that FP8 makes faster, alike on all ranks: by an equal share of the batch."""
    x, y, count = next(batches.evaluation())
    if isinstance(x, Tensor):
        x, y = x[: min(2, count)], y[: min(2, count)]
    samples = batches.config.batch_size // (batches.shard.world * batches.shard.micro)
    return fp8.choose(model, x, len(y), samples, precision.autocast)


def settle_fp8(model: nn.Module, precision: Precision, choice: fp8.Choice | None, decided: Decisions) -> None:
    """Let the layers chosen multiply in FP8 from now on, and write down which they are.

    Raises:
        ModelError: there are none.
    """
    assert choice is not None
    precision.convert(choice.check(model))
    decided.revise("fp8", list(choice.layers), choice.told)
