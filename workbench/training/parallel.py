"""One objective on several ranks: copies of it, shards, divided layers, stages.

:func:`parallelize` gives the trainer a :class:`Parallel`, which carries out the forward and backward passes of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.data.batches import Batch
from workbench.distributed import World, local, whole
from workbench.errors import ConfigError
from workbench.training.blocks import blocks_of
from workbench.training.communication import exchanged_bytes, payload, replicate
from workbench.training.communication_config import CommunicationConfig
from workbench.training.compilation import compile_parts, compile_whole
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective
from workbench.training.pipeline import Line, one_forward_one_backward, through
from workbench.training.stages import Stage


class Parallel:
    """An objective on one rank, alone or with ranks that compute the same samples.

    Attributes:
        forward: to be called in the objective's place.
        payload: bytes of gradients that this rank gives to its peers each step, as far as they can be counted.
        buckets: bytes of the memory, kept between steps, that gradients travel in; ``views``: they lie in it from the first.
        marked: where the backward pass itself notes when this rank's own gradients are computed
            (:func:`workbench.training.device_time.marked`), or None.
    """

    payload = 0
    marked: Tensor | None = None
    buckets = 0
    views = False

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.forward: Callable[[Any, Any], Tensor] = objective

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

    def output(self, x: Any) -> Any:
        """The model's output for a batch; None on a rank that hasn't the last of its layers."""
        return self.objective.model(x)

    def owns(self, name: str) -> bool:
        """Whether this rank has the tensor of that name in the model's state, or a part of it."""
        return True

    def share(self, buffers: Iterable[Tensor]) -> None:
        """The first copy's buffers to all, as the next forward pass would do: else a checkpoint mixes the ranks' statistics."""
        if dist.is_initialized():
            for buffer in buffers:
                dist.broadcast(buffer, src=0)

    def state(self) -> Mapping[str, Tensor]:
        """All of the model's tensors by name, for rank 0 to save; every rank calls it."""
        state: dict[str, Tensor] = self.objective.model.state_dict()
        return state

    def carried(self) -> Mapping[str, Tensor]:
        """Tensors that the exchange of gradients carries from step to step; a checkpoint loads them in place."""
        return {}


class Replicated(Parallel):
    """A copy on every rank; gradients are averaged while the backward pass runs (DDP)."""

    def __init__(self, objective: Objective, communication: CommunicationConfig, world: World, deterministic: bool) -> None:
        super().__init__(objective)
        self._rank = world.rank
        self._ddp, self._low_rank = replicate(objective, communication, deterministic=deterministic)
        self.forward = self._ddp
        self.payload = payload(objective, communication, self._low_rank)
        self.buckets, self.views = exchanged_bytes(objective), self._ddp.gradient_as_bucket_view

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._ddp.no_sync()

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
            # Left gathered after an evaluation, the root's weights would be those of the average; so too in stages.
            fully_shard(root, mesh=over, reshard_after_forward=True)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        for root in self._roots:
            root.set_requires_gradient_sync(last)
        return nullcontext()


class Staged(Divided):
    """A stage of the blocks on each rank, through which the micro-batches of a step flow.

    The loss is the last stage's alone; copies of a stage average their gradients after the last micro-batch.
    """

    def __init__(self, objective: Objective, mesh: Mesh, stage: Stage) -> None:
        from torch.distributed.fsdp import fully_shard

        super().__init__(objective)
        self._mesh, self._stage = mesh, stage
        self._line = Line(mesh.along("pipeline").get_group())
        self._sharded: list[Any] = []
        if mesh["shard"] > 1:
            over = mesh.along("replicate", "shard")
            self._sharded = [fully_shard(block, mesh=over, reshard_after_forward=True) for block in stage.blocks]
        apart = {id(p) for block in self._sharded for p in block.parameters()}
        self._averaged = [p for p in objective.model.parameters() if p.requires_grad and id(p) not in apart]
        self._copies = [mesh.along(name).get_group() for name in ("replicate", "shard") if mesh[name] > 1]

    def step(
        self,
        micro_batches: Iterable[Batch],
        count: int,
        parts: float,
        around: Callable[[], AbstractContextManager[Any]],
        backward: Callable[[Tensor, bool], None],
    ) -> Tensor:
        batches = list(micro_batches)
        total = torch.zeros((), device=self._mesh.world.device)

        def run_forward(number: int, hidden: Tensor | None) -> Tensor:
            x, y = batches[number]
            with around():
                if self._stage.last:
                    return self._stage(lambda: self.forward(x, y), hidden) / parts
                return self._stage(lambda: self.objective.model(x), hidden)

        def run_backward(number: int, given: Tensor, gradient: Tensor | None) -> None:
            final = number == count - 1
            for block in self._sharded:
                block.set_requires_gradient_sync(final)
            if gradient is not None:
                torch.autograd.backward(given, gradient)
                return
            total.add_(given.detach())
            backward(given, final)

        def room(number: int) -> Tensor:
            return self._stage.room(len(batches[number][1]), total.device)

        one_forward_one_backward(self._line, count, room, run_forward, run_backward)
        self._average()
        return total * self._line.length  # the mean over all ranks is then that over copies

    @torch.no_grad()
    def _average(self) -> None:
        gradients = [local(p.grad) for p in self._averaged if p.grad is not None]
        if not self._copies or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for group in self._copies:
            dist.all_reduce(flat, group=group)
        flat /= self._mesh.copies
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def output(self, x: Any) -> Any:
        room = partial(self._stage.room, len(x), x.device)
        return through(self._line, room, lambda hidden: self._stage(lambda: self.objective.model(x), hidden))

    def owns(self, name: str) -> bool:
        return self._stage.owns(name)

    def share(self, buffers: Iterable[Tensor]) -> None:
        for buffer in buffers:
            for group in self._copies:
                dist.broadcast(buffer, group_src=0, group=group)

    def state(self) -> Mapping[str, Tensor]:
        state = self.objective.model.state_dict()
        own = {name: whole(tensor.detach()).contiguous() for name, tensor in state.items() if self.owns(name)}
        said: list[Any] = [None] * self._line.length
        dist.all_gather_object(said, {name: (value.shape, value.dtype) for name, value in own.items()}, self._line.group)
        if self._line.place:
            for value in own.values():
                dist.send(value, group_dst=0, group=self._line.group)
            return {}
        device = self._mesh.world.device
        for place, names in enumerate(said[1:], start=1):
            for name, (shape, dtype) in names.items():
                value = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(value, group_src=place, group=self._line.group)
                own[name] = value.cpu()
        return {name: own[name] for name in state}


def parallelize(
    objective: Objective,
    mesh: Mesh,
    compile_mode: str,
    *,
    communication: CommunicationConfig | None = None,
    accumulate: int = 1,
    deterministic: bool = False,
    stage: Stage | None = None,
) -> Parallel:
    """``objective`` compiled, and joined with those of the other ranks; it is changed in place.

    Its parameters may be others afterwards: make optimizers and averages of them then.

    Args:
        compile_mode: of torch.compile, or ``off``.
        communication: how copies exchange gradients.
        accumulate: micro-steps of a step.
        stage: this rank's, where the model is divided into stages.

    Raises:
        ConfigError: a divided model with captured graphs, whose tensors must stay where they are.
    """
    communication = communication or CommunicationConfig()
    # A graph exchanges the gradients that it computes, not what micro-steps before it have gathered.
    one_graph = compile_mode != "off" and accumulate == 1 and communication.compress != "powersgd" and not mesh.world.others
    if mesh.plain and mesh.copies > 1 and one_graph:
        from workbench.training.compiled_replicas import CompiledReplicas

        return CompiledReplicas(objective, compile_mode, communication, mesh.world, deterministic)
    if mesh.plain:
        if compile_mode != "off" and objective._compiled_call_impl is None:  # for a measurement it may have been
            compile_whole(objective, compile_mode)
        return Replicated(objective, communication, mesh.world, deterministic) if mesh.copies > 1 else Parallel(objective)
    if compile_mode not in ("off", "default"):
        raise ConfigError(
            f"compile={compile_mode!r} captures graphs, and a divided model exchanges tensors within.",
            "Take compile='default' or 'off' with mesh.shard or mesh.tensor, or replicate the model.",
        )
    # Between blocks, weights are gathered: each is compiled for itself, and equal ones once.
    if compile_mode != "off":
        compile_parts(blocks_of(objective.model) if stage is None else stage.blocks, compile_mode)
    if stage is not None:
        return Staged(objective, mesh, stage)
    return Sharded(objective, mesh) if mesh.copies > 1 else Divided(objective)


def _parts(objective: Objective) -> Iterator[nn.Module]:
    yield objective.model
    if objective.distillation is not None:
        yield objective.distillation.layers
