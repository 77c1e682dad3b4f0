"""Activation checkpointing by block (Chen et al. 2016, arXiv:1604.06174): activations are computed again instead of kept.

:func:`recompute_blocks` acts on a model's blocks in place, before or after these are compiled, copied or sharded: under
``torch.compile`` the recomputation becomes part of the graph, under FSDP2 it finds the gathered weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from workbench.errors import ConfigError, ModelError
from workbench.training.blocks import blocks_of

Buffers = dict[str, Tensor | None]


def recompute_blocks(model: nn.Module, share: float) -> Callable[[], None]:
    """Have a share of a model's blocks compute their activations again in the backward pass; returns what undoes it.

    The first blocks are taken: theirs are kept longest, while those of the last one are needed at once. Random numbers are drawn
    as in the first pass, and batch statistics are counted once.

    Args:
        share: of :func:`~workbench.training.parallel.blocks_of` the model, 0 to 1, rounded to whole blocks.

    Raises:
        ConfigError: the model has no blocks.
    """
    if not share:
        return lambda: None
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"memory.recompute={share:g} takes a model of repeated blocks, and {type(model).__name__} has none.",
            "Put its layers into modules of one class within an nn.Sequential or nn.ModuleList, or take accumulate.",
        )
    chosen = blocks[: round(share * len(blocks))]
    for block in chosen:
        norms: dict[nn.Module, Buffers] = {module: _spare(module) for module in block.modules() if isinstance(module, _BatchNorm)}
        # Not a closure: a copy of the block is to compute with its own layers.
        block.forward = partial(_twice, block, norms)

    def undo() -> None:
        for block in chosen:
            block.__dict__.pop("forward", None)

    return undo


def _twice(block: nn.Module, norms: dict[nn.Module, Buffers], *args: Any, **kwargs: Any) -> Any:
    """A block's forward pass, and once more when the backward pass asks for its activations."""
    original = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    if torch.compiler.is_compiling():  # a compiled graph holds each change of a buffer once, wherever it is computed
        return checkpoint(original, *args, use_reentrant=False, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _buffers_stay(block, norms), _set_aside(norms)

    return checkpoint(original, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _spare(norm: nn.Module) -> Buffers:
    return {name: None if value is None else torch.zeros_like(value) for name, value in norm._buffers.items()}


@contextmanager
def _set_aside(norms: dict[nn.Module, Buffers]) -> Iterator[None]:
    """Batch normalization counts into other buffers: what it computes in training does not depend on them."""
    kept = [norm._buffers for norm in norms]
    for norm, spare in norms.items():
        if norm.training:
            norm._buffers = spare
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers = buffers


@contextmanager
def _buffers_stay(block: nn.Module, norms: dict[nn.Module, Buffers]) -> Iterator[None]:
    """Around the first pass: a block that changes its state computes something else the second time."""
    counted = {id(buffer) for norm in norms for buffer in norm.buffers()}
    before = [(name, buffer, buffer._version) for name, buffer in block.named_buffers() if id(buffer) not in counted]
    yield
    for name, buffer, version in before:
        owner, _, key = name.rpartition(".")
        if buffer._version != version or block.get_submodule(owner)._buffers.get(key) is not buffer:
            raise ModelError(
                f"The buffer {name!r} of a {type(block).__name__} changes when it computes, so computing it again would give "
                "other gradients.",
                "Set memory.recompute=0; memory.offload=activations saves memory too.",
            )
