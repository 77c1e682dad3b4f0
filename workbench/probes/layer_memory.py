"""What each layer's forward pass leaves allocated for the backward pass, from one pass that is watched.

:func:`watched` puts hooks on a model's modules for the length of a forward pass, and takes them off again. On CUDA they read the
allocator's counters, which the host keeps: nothing waits, and it is exact. A CPU's allocator has none; there the storages are
counted that autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from workbench.allocator import storages
from workbench.probes.holders import ByLayer

OUTSIDE = "(loss)"
"""What computes outside of the model's modules."""


@contextmanager
def watched(model: nn.Module, device: torch.device) -> Iterator[ByLayer]:
    """Around a forward pass: bytes by module, of what it leaves allocated itself, its children's apart.

    The dict is filled when the pass has ended. On CUDA the numbers sum to what the pass allocated and did not free: saved
    tensors, outputs, and copies of weights in another precision alike, rounded as the allocator does; a layer that lets go of
    what another made has a negative number. Weights that are gathered for a block (FSDP2) count where they are let go, so that
    of neighbouring blocks one may have what is the other's.

    On a CPU they are storages that autograd saves, each for the layer that saves it first, without parameters, buffers and the
    model's input. What a block that computes again keeps of its input is not seen there.
    """
    found: ByLayer = {}
    with _allocated(model, device, found) if device.type == "cuda" else _saved(model, found):
        yield found


@contextmanager
def _allocated(model: nn.Module, device: torch.device, found: ByLayer) -> Iterator[None]:
    within = [0]
    """Bytes of the children that have ended, by depth of the modules that compute."""
    began: list[int] = []

    def enter(name: str) -> None:
        within.append(0)
        began.append(torch.cuda.memory_allocated(device))

    def leave(name: str) -> None:
        change, children = torch.cuda.memory_allocated(device) - began.pop(), within.pop()
        found[name] = found.get(name, 0) + change - children
        within[-1] += change

    enter(OUTSIDE)
    with _hooks(model, enter, leave):
        yield
    leave(OUTSIDE)


@contextmanager
def _saved(model: nn.Module, found: ByLayer) -> Iterator[None]:
    inside = [OUTSIDE]
    known = {storage.data_ptr() for tensor in (*model.parameters(), *model.buffers()) for storage in storages(tensor)}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._is_view() else tensor
        if not isinstance(base, nn.Parameter):
            for storage in storages(tensor):
                if storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    found[inside[-1]] = found.get(inside[-1], 0) + storage.nbytes()
        return tensor.detach()

    def see_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known.update(storage.data_ptr() for leaf in leaves for storage in storages(leaf))

    handle = model.register_forward_pre_hook(see_input, with_kwargs=True)
    try:
        with _hooks(model, inside.append, lambda name: inside.pop()), saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        handle.remove()


@contextmanager
def _hooks(model: nn.Module, enter: Callable[[str], Any], leave: Callable[[str], Any]) -> Iterator[None]:
    """Call ``enter`` before and ``leave`` after each module computes, however it ends, outside of what other hooks do."""

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            enter(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leave(name)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(before(name), prepend=True).remove)
            stack.callback(module.register_forward_hook(after(name), always_call=True).remove)
        yield
