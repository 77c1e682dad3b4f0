"""A file of another runtime as a module: called, copied and saved like any other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import ModelError


class FileModel(nn.Module):
    """A model that another runtime opens from bytes, on the CPU. The bytes are buffers, so that they are saved like weights.

    Args:
        files: the bytes, by the name of the buffer that holds them.
    """

    runtime: ClassVar[str]

    def __init__(self, **files: bytes) -> None:
        super().__init__()
        for name, content in files.items():
            self.register_buffer(name, torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.training = False
        self._opened: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self._opened is None:
            self._opened = self._open()
        return self._run(self._opened, x.detach().cpu().contiguous())

    def train(self, mode: bool = True) -> FileModel:
        """Evaluation mode is all there is."""
        if mode:
            raise ModelError(f"{self.runtime} doesn't train.", "Fine-tune the model first, then quantize it.")
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # a copy opens its own

    def _content(self, name: str) -> bytes:
        buffer: Tensor = self.get_buffer(name)
        return buffer.numpy().tobytes()

    def _open(self) -> Any:
        """The runtime's form of the bytes, made once, at the first call."""
        raise NotImplementedError(f"{type(self).__name__} must say how its bytes are opened.")

    def _run(self, opened: Any, x: Tensor) -> Tensor:
        """Its output for ``x`` (N, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is called.")
