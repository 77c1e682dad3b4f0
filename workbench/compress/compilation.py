"""The fast form of a model on the CPU: compiled by Inductor with frozen weights, float or INT8."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from workbench.errors import DeviceError
from workbench.models.structure import structure_of


def compiled(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The fast form of a model for inference: Inductor with frozen weights; INT8 graphs get INT8 kernels.

    Each new batch size is compiled once, at its first call (seconds).

    Args:
        model: any module, quantized or not; a copy of it is compiled, in evaluation mode.
        dtype: ``torch.bfloat16`` runs the float parts under autocast.

    Raises:
        DeviceError: there is no C++ compiler on this machine.
    """
    if not has_compiler():
        raise DeviceError("Compiling needs a C++ compiler, and none was found.", "Install g++ (apt-get install g++), or set CXX.")
    return _Compiled(model, dtype)


def has_compiler() -> bool:
    """Whether a C++ compiler is there for Inductor to use."""
    return any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++"))


def import_quietly(module: str) -> ModuleType:
    """Import a module that has PyTorch log remarks of no use to the reader of a notebook: of its own enums, of a missing CUDA."""
    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Compiled(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # Importing the quantizer registers the fusion passes that turn quantize-dequantize pairs into INT8 kernels.
        import_quietly("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        import_quietly("torch.utils.cpp_extension")
        self.model = copy.deepcopy(model).eval()  # frozen weights are copies anyway: don't follow later changes in half
        self.dtype = dtype
        self.structure = structure_of(model)
        self.training = False
        # Left to itself, a second batch size would get one kernel for all sizes, which is slower. In a tuple: a compiled module
        # set as an attribute would be a submodule, and its weights would count twice.
        self._call = (torch.compile(self.model, dynamic=False),)
        self._seen: set[tuple[Any, ...]] = set()

    def forward(self, x: torch.Tensor) -> Any:
        key = (x.shape, x.dtype, x.stride())
        # Tracing reads the freezing flag too, so it can't be an option of torch.compile; and weights are frozen only where no
        # gradient can be asked for.
        with (
            self._tracing(key),
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16),
        ):
            output = self._call[0](x)
        self._seen.add(key)
        return output

    @contextmanager
    def _tracing(self, key: tuple[Any, ...]) -> Iterator[None]:
        if key in self._seen:
            yield
            return
        # Models of one class share a cache of compiled code, and past its limit they would run uncompiled without a word.
        with (
            torch._inductor.config.patch(freezing=True),
            torch._dynamo.config.patch(recompile_limit=1024),
            warnings.catch_warnings(),
        ):
            # Inductor's lowering of INT8 convolutions copies zero points in a way that torch itself discourages.
            warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
            yield
