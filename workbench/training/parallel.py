"""One objective on several ranks: copies of it, or shards.

:func:`parallelize` gives the trainer a :class:`Parallel`: what it calls in place of the objective, and when gradients travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.training.objective import Objective


class Parallel:
    """An objective on one rank, alone.

    Attributes:
        forward: to be called in the objective's place.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.forward: nn.Module = objective

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-step: gradients travel between ranks after the ``last`` only."""
        return nullcontext()

    def state(self) -> Mapping[str, Tensor]:
        """All of the model's tensors by name, for rank 0 to save; every rank calls it."""
        state: dict[str, Tensor] = self.objective.model.state_dict()
        return state


class Replicated(Parallel):
    """A copy on every rank; gradients are averaged while the backward pass runs (DDP)."""

    def __init__(self, objective: Objective, deterministic: bool) -> None:
        super().__init__(objective)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, objective.constants)
        # As views of buckets, gradients shift in memory once the buckets are rebuilt, and norms of them by their last bit.
        self.forward: DistributedDataParallel = DistributedDataParallel(objective, gradient_as_bucket_view=not deterministic)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.forward.no_sync()


class Sharded(Parallel):
    """Weights, gradients and optimizer state spread over ranks, block by block (FSDP2, Zhao et al. 2023, arXiv:2304.11277).

    A block's weights are gathered when it computes and given up after; its gradients are averaged over all ranks, and each keeps
    the part that belongs to its weights.
    """

    def __init__(self, objective: Objective, arranged: Mapping[str, int], device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(objective)
        sizes = {name: size for name, size in arranged.items() if size > 1}
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        # What the terms of distillation learn is no part of the model.
        self._roots: list[Any] = [part for part in _parts(objective) if any(True for _ in part.parameters())]
        for root in self._roots:
            for block in blocks_of(root):
                fully_shard(block, mesh=mesh)
            # Left gathered after an evaluation, the root's weights would be those of the average.
            fully_shard(root, mesh=mesh, reshard_after_forward=True)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        for root in self._roots:
            root.set_requires_gradient_sync(last)
        return nullcontext()

    def state(self) -> Mapping[str, Tensor]:
        """On the CPU; ranks other than 0 get none."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.objective.model, options=options)
        return state


def parallelize(
    objective: Objective, arranged: Mapping[str, int], world: World, compile_mode: str, *, deterministic: bool = False
) -> Parallel:
    """``objective`` compiled, and joined with those of the other ranks; it is changed in place.

    Its parameters may be others afterwards: make optimizers and averages of them then.

    Args:
        arranged: ranks along each dimension of the mesh.
        compile_mode: of torch.compile, or ``off``.

    Raises:
        ConfigError: shards with captured graphs, whose weights must stay where they are.
    """
    sharded = arranged["shard"] > 1
    if compile_mode != "off":
        torch.compiler.reset()  # what a kernel compiled before must not decide how this run is compiled, nor use up the limit
        if sharded and compile_mode != "default":
            raise ConfigError(
                f"compile={compile_mode!r} captures graphs, and sharded weights move between uses.",
                "Take compile='default' or 'off' with mesh.shard, or replicate the model.",
            )
        # Between blocks, weights are gathered: each is compiled for itself, and equal ones once.
        for part in blocks_of(objective.model) if sharded else [objective]:
            part.compile(mode=None if compile_mode == "default" else compile_mode)
    if sharded:
        return Sharded(objective, arranged, world.device)
    return Replicated(objective, deterministic) if world.size > 1 else Parallel(objective)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, in order: modules of one class, themselves of several layers, that follow one another.

    Residual blocks, transformer layers; none for a model without any.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        repeated = _repeated(module)
        # Stages of one class hold the blocks themselves.
        if any(_repeated(part) for stage in repeated for part in stage.modules()):
            repeated = []
        found.extend(repeated)
        for child in module.children():
            if child not in repeated:
                visit(child)

    visit(model)
    return found


def _repeated(module: nn.Module) -> list[nn.Module]:
    """Of a list of modules, those of several layers that have another of their class beside them."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return []
    kinds = [type(child) for child in module]
    return [child for child in module if kinds.count(type(child)) > 1 and any(True for _ in child.children())]


def _parts(objective: Objective) -> Iterator[nn.Module]:
    yield objective.model
    if objective.distillation is not None:
        yield objective.distillation.layers
