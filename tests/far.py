"""A second device where there is none: ``far:0``, whose tensors lie in main memory and refuse to be mixed with those of the CPU.

A PrivateUse1 backend in Python. It computes with the CPU's own operations, so that a model with layers on it gives the same bits;
every copy must be asked for, as between a CPU and a GPU. For processes of their own: PyTorch takes one such backend for good.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration as registration
from torch.utils._pytree import tree_leaves, tree_map

KNOWN = hasattr(registration, "_setup_privateuseone_for_python_backend")
"""Whether this PyTorch can have a backend in Python."""


class Far(Tensor):
    """A tensor on ``far:0``; ``held`` is what it is in main memory."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        return Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype, device="far:0")

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"Far({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if operation is torch.ops.aten.copy_.default:  # the one that may be given both
            _held(args[0]).copy_(_held(args[1]))
            return args[0]
        near = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not isinstance(leaf, Far)]
        if any(tensor.ndim for tensor in near):
            raise RuntimeError(f"{operation}: Expected all tensors to be on the same device, but found far:0 and cpu!")
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        found = operation(*_held(args), **_held(kwargs))
        if operation._schema.is_mutable:
            first = operation._schema.returns and operation._schema.returns[0].alias_info is not None
            return args[0] if first else None
        if target is not None and torch.device(target).type == "cpu":
            return found
        return tree_map(lambda leaf: Far(leaf) if isinstance(leaf, Tensor) else leaf, found)


def register() -> torch.device:
    """Have the device in this process."""

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

        def synchronize(self) -> None: ...

    class Module(registration._DummyBackendModule):
        only = Stream()

        def current_stream(self, *device: Any) -> Stream:
            return self.only

        def stream(self, stream: Any) -> Any:
            return contextlib.nullcontext()

    registration._setup_privateuseone_for_python_backend("far", Module())
    operations = torch.library.Library("aten", "IMPL")
    operations.impl("empty.memory_format", _empty, "PrivateUse1")
    operations.impl("empty_strided", _empty_strided, "PrivateUse1")
    operations.impl("_copy_from", _copy_from, "PrivateUse1")
    _kept.append(operations)
    return torch.device("far:0")


_kept: list[Any] = []  # operations are there while their library is


def _held(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, Far) else leaf, values)


def _empty(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, memory_format: Any = None
) -> Far:
    return Far(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Far:
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Any, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target
