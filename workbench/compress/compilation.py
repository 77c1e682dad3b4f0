"""The fast form of a model: compiled by Inductor, float or INT8; and why a model can't be compiled."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from workbench.compress.capture import Captured
from workbench.compress.joined import join_siblings
from workbench.compress.sample import try_out
from workbench.errors import DeviceError, ModelError
from workbench.models.structure import check_module, structure_of


def compiled(model: nn.Module, dtype: torch.dtype = torch.float32, *, tune: bool = False) -> nn.Module:
    """The fast form of a model for inference: Inductor with frozen weights; INT8 graphs get INT8 kernels.

    Each new batch size is compiled once, at its first call (seconds; minutes with ``tune``). On CUDA devices, calls are captured.

    Args:
        model: any module, quantized or not; a copy of it is compiled, in evaluation mode.
        dtype: ``torch.bfloat16`` runs the float parts under autocast.
        tune: time several kernels for each matrix product while compiling, and keep the fastest.

    Raises:
        DeviceError: there is no C++ compiler on this machine.
        ModelError: at the first call, the model can't be compiled as one graph; the message names the line.
        DataError: at a call, the model doesn't take the input even uncompiled.
    """
    check_module(model)
    if not has_compiler():
        raise DeviceError("Compiling needs a C++ compiler, and none was found.", "Install g++ (apt-get install g++), or set CXX.")
    return _Compiled(model, dtype, tune)


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


_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether this PyTorch keeps what it compiles for one model apart from another of its class."""


class _Compiled(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype, tune: bool) -> None:
        super().__init__()
        # Importing the quantizer registers the fusion passes that turn quantize-dequantize pairs into INT8 kernels.
        import_quietly("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        import_quietly("torch.utils.cpp_extension")
        self.model = copy.deepcopy(model).eval()  # frozen weights are copies anyway: don't follow later changes in half
        self.dtype = dtype
        self.structure = structure_of(model)
        self.training = False
        self.cuda_device = any(tensor.is_cuda for tensor in self.model.state_dict().values())
        quantized = any(transform["kind"] == "quantize" for transform in self.structure.transforms)
        self._options = self._inductor_options(quantized)
        # A recurrent layer is a call of its own between two graphs; anything else that breaks a graph is an error.
        # Left to itself, a second batch size would get one kernel for all sizes, which is slower. In a tuple: a compiled module
        # set as an attribute would be a submodule, and its weights would count twice.
        whole = not any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        settings: dict[str, Any] = {"options": {"max_autotune": tune}}
        if _ISOLATES:
            # Models of one class share compiled code otherwise, and with the guards gone one would answer for another.
            settings = {"isolate_recompiles": True, "options": {"max_autotune": tune, "guard_filter_fn": _only_inputs}}
        self._call = (torch.compile(self.model, dynamic=False, fullgraph=whole, **settings),)
        self._seen: set[tuple[Any, ...]] = set()
        self._run: Callable[[torch.Tensor], Any] = Captured(self._compiled) if self.cuda_device else self._compiled

    def _inductor_options(self, quantized: bool) -> dict[str, Any]:
        """Settings that tracing reads too, so that they can't be options of torch.compile."""
        if self.cuda_device:
            return {"freezing": True}
        # Calling twenty or fifty INT8 kernels from Python costs as much as a few of them take.
        return {"freezing": True, "cpp_wrapper": quantized}

    def forward(self, x: torch.Tensor) -> Any:
        return self._run(x)

    def _compiled(self, x: torch.Tensor) -> Any:
        key = (x.shape, x.dtype, x.stride())
        device = "cuda" if self.cuda_device else "cpu"
        if not self._seen:
            join_siblings(self.model, x)
        # Weights are frozen only where no gradient can be asked for. Autocast's cache of weights would be freed between captured
        # calls.
        with (
            self._tracing(key, x),
            torch.no_grad(),
            torch.autocast(
                device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16, cache_enabled=not self.cuda_device
            ),
        ):
            output = self._call[0](x)
        self._seen.add(key)
        return output

    @contextmanager
    def _tracing(self, key: tuple[Any, ...], x: torch.Tensor) -> Iterator[None]:
        if key in self._seen:
            yield
            return
        # Models of one class share a cache of compiled code, and past its limit they would run uncompiled without a word.
        with (
            torch._inductor.config.patch(**self._options),
            torch._dynamo.config.patch(recompile_limit=1024),
            warnings.catch_warnings(),
        ):
            # Inductor's lowering of INT8 convolutions copies zero points in a way that torch itself discourages.
            warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
            try:
                yield
            except torch._dynamo.exc.Unsupported as error:
                try_out(self.model, x, "the input")  # what the model itself refuses is no fault of its code
                raise ModelError(
                    f"{type(self.model).__name__} can't be compiled as one graph{where(error)}: {first_line(error)}",
                    "Rewrite that line without branches on tensor values (torch.where, torch.cond), or run the model as it is.",
                ) from error


def _only_inputs(guards: Any) -> list[bool]:
    """Of all that could change between two calls, only the input does: the model is a copy of ours."""
    return [g.guard_type == "TENSOR_MATCH" and not g.orig_guard.source.is_unspecialized_nn_module() for g in guards]


def where(error: BaseException) -> str:
    """`` at file.py:12`` of the reader's own code, as far as the error tells; else nothing."""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames: list[traceback.FrameSummary] = list(getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


def first_line(error: BaseException) -> str:
    """What an error says, without its pages of context."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
