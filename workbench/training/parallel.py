"""One objective on several ranks: copies of it, or shards.

:func:`parallelize` gives the trainer a :class:`Parallel`, which carries out the forward and backward passes of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from workbench.data.batches import Batch
from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.training.communication import payload, replicate
from workbench.training.communication_config import CommunicationConfig
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective


class Parallel:
    """An objective on one rank, alone or with ranks that compute the same samples.

    Attributes:
        forward: to be called in the objective's place.
        payload: bytes of gradients that this rank gives to its peers each step, as far as they can be counted.
    """

    payload = 0

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.forward: nn.Module = objective

    def step(
        self,
        micro_batches: Iterable[Batch],
        count: int,
        parts: float,
        around: Callable[[], AbstractContextManager[Any]],
        backward: Callable[[Tensor, bool], None],
    ) -> Tensor:
        """Forward and backward passes over a step's ``count`` micro-batches.

        Args:
            parts: what each micro-batch's loss is divided by.
            around: what the forward pass runs in.
            backward: runs the backward pass from a loss; told whether it is the step's last.

        Returns:
            The sum of these losses, a scalar.
        """
        total: Tensor | None = None
        for index, (x, y) in enumerate(micro_batches, start=1):
            last = index == count
            with self.micro_step(last):
                with around():
                    loss = self.forward(x, y) / parts
                backward(loss, last)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-step: gradients travel between ranks after the ``last`` only."""
        return nullcontext()

    def state(self) -> Mapping[str, Tensor]:
        """All of the model's tensors by name, for rank 0 to save; every rank calls it."""
        state: dict[str, Tensor] = self.objective.model.state_dict()
        return state

    def carried(self) -> Mapping[str, Tensor]:
        """Tensors that the exchange of gradients carries from step to step; a checkpoint loads them in place."""
        return {}


class Replicated(Parallel):
    """A copy on every rank; gradients are averaged while the backward pass runs (DDP)."""

    forward: DistributedDataParallel

    def __init__(self, objective: Objective, communication: CommunicationConfig, world: World, deterministic: bool) -> None:
        super().__init__(objective)
        self._rank = world.rank
        self.forward, self._low_rank = replicate(objective, communication, deterministic=deterministic)
        self.payload = payload(objective, communication, self._low_rank)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.forward.no_sync()

    def carried(self) -> Mapping[str, Tensor]:
        return {} if self._low_rank is None else self._low_rank.state(self._rank)


class Divided(Parallel):
    """Some tensors are spread over ranks."""

    def state(self) -> Mapping[str, Tensor]:
        """On the CPU; ranks other than 0 get none."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self.objective.model, options=options)
        return state


class Sharded(Divided):
    """Weights, gradients and optimizer state spread over ranks, block by block (FSDP2, Zhao et al. 2023, arXiv:2304.11277).

    A block's weights are gathered when it computes and given up after; its gradients are averaged over all ranks, and each keeps
    the part that belongs to its weights.
    """

    def __init__(self, objective: Objective, mesh: Mesh) -> None:
        from torch.distributed.fsdp import fully_shard

        super().__init__(objective)
        over = mesh.along("replicate", "shard")
        # What the terms of distillation learn is no part of the model.
        self._roots: list[Any] = [part for part in _parts(objective) if any(True for _ in part.parameters())]
        for root in self._roots:
            for block in blocks_of(root):
                fully_shard(block, mesh=over)
            # Left gathered after an evaluation, the root's weights would be those of the average.
            fully_shard(root, mesh=over, reshard_after_forward=True)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        for root in self._roots:
            root.set_requires_gradient_sync(last)
        return nullcontext()


def parallelize(
    objective: Objective,
    mesh: Mesh,
    compile_mode: str,
    *,
    communication: CommunicationConfig | None = None,
    deterministic: bool = False,
) -> Parallel:
    """``objective`` compiled, and joined with those of the other ranks; it is changed in place.

    Its parameters may be others afterwards: make optimizers and averages of them then.

    Args:
        compile_mode: of torch.compile, or ``off``.
        communication: how copies exchange gradients.

    Raises:
        ConfigError: a divided model with captured graphs, whose tensors must stay where they are.
    """
    if compile_mode != "off":
        torch.compiler.reset()  # what a kernel compiled before must not decide how this run is compiled, nor use up the limit
        if not mesh.plain and compile_mode != "default":
            raise ConfigError(
                f"compile={compile_mode!r} captures graphs, and a divided model exchanges tensors within.",
                "Take compile='default' or 'off' with mesh.shard or mesh.tensor, or replicate the model.",
            )
        # Between blocks, weights are gathered: each is compiled for itself, and equal ones once.
        for part in [objective] if mesh.plain else blocks_of(objective.model):
            part.compile(mode=None if compile_mode == "default" else compile_mode)
    if not mesh.plain:
        return Sharded(objective, mesh) if mesh.copies > 1 else Divided(objective)
    if mesh.copies == 1:
        return Parallel(objective)
    return Replicated(objective, communication or CommunicationConfig(), mesh.world, deterministic)


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
