"""Process groups: who we are, how processes meet and part; norms of tensors that are spread over them, or over devices.

Without ``torchrun``'s environment a program is rank 0 of 1, and everything here is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import ConfigError, DeviceError
from workbench.placement import ParallelModel as ParallelModel
from workbench.placement import to_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    others: tuple[torch.device, ...] = ()
    """Further devices that this process drives, where layers of its model lie."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that this process drives, its own first."""
        return (self.device, *self.others)

    @property
    def main(self) -> bool:
        return self.rank == 0


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device of this process.

    Raises:
        DeviceError: no such accelerator, or fewer than there are processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "device='cuda', but PyTorch sees no CUDA device here.", "Take device='auto' or 'cpu', or check nvidia-smi."
        )
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"This is process {local_rank + 1} on this machine, but it has {torch.cuda.device_count()} CUDA device(s).",
            f"Start at most {torch.cuda.device_count()} processes, or take device='cpu'.",
        )
    return torch.device("cuda", local_rank)


def init_distributed(backend: str | None = None, *, device: str = "auto", timeout: float = 1800.0) -> World:
    """Join the process group that ``torchrun`` describes; rank 0 of 1 without it.

    Args:
        backend: ``nccl``, ``gloo`` …; by default NCCL on CUDA devices and gloo otherwise.
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout: seconds after which a collective that a peer never joins fails.

    Raises:
        ConfigError: NCCL without CUDA.
        DeviceError: see :func:`pick_device`.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if backend == "nccl" and chosen.type != "cuda":
        raise ConfigError("backend='nccl' needs CUDA devices, and this process has none.", "Take backend='gloo'.")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend or ("nccl" if chosen.type == "cuda" else "gloo"),
            timeout=timedelta(seconds=timeout),
            device_id=chosen if chosen.type == "cuda" else None,
            **_meeting(rank, size),
        )
    return World(rank, size, local_rank, chosen)


def _meeting(rank: int, size: int) -> dict[str, Any]:
    """Where ranks meet: at the socket that their supervisor opened for rank 0, else as torchrun's environment says."""
    if "WORKBENCH_SUPERVISOR" not in os.environ:
        return {}
    listener = int(os.environ["WORKBENCH_LISTENER"]) if rank == 0 else None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=rank == 0, master_listen_fd=listener)
    return {"store": store, "rank": rank, "world_size": size}


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """The group for the length of a block; left in order when the block ends well, at once when it fails."""
    joined_here = not dist.is_initialized()
    world = init_distributed(device=device)
    try:
        yield world
        if world.size > 1:
            dist.barrier()
    finally:
        if joined_here and dist.is_initialized():
            dist.destroy_process_group()


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """``value`` averaged over all ranks, in place, without waiting on the host."""
    if world.size > 1:
        dist.all_reduce(value)
        value /= world.size
    return value


def sum_over_ranks(value: Tensor, world: World) -> Tensor:
    """``value`` summed over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (a view); any other as it is."""
    return tensor.to_local() if _is_spread(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered: every rank of its mesh calls it; any other as it is."""
    return tensor.full_tensor() if _is_spread(tensor) else tensor


@torch.no_grad()
def whole_norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """float32 [tensors]: the norm of each, of the whole tensor where a rank holds a part; one collective for all of them.

    Args:
        tensors: at least one; the norms are on the first one's device.
        order: 2 or infinity.
    """
    parts = [local(tensor) for tensor in tensors]
    filled = [part for part in parts if part.numel()]  # a small tensor leaves some ranks without any of it
    found: dict[int, Tensor] = {}
    for (held,) in by_device(filled):
        found |= zip(map(id, held), torch._foreach_norm(held, order, dtype=torch.float32), strict=True)
    nothing = torch.zeros((), device=parts[0].device)
    norms = stacked([found.get(id(part), nothing) for part in parts])
    if not any(map(_is_spread, tensors)):
        return norms
    if order == 2:
        return sum_over_shards(norms.double().square(), tensors).sqrt().float()
    return sum_over_shards(norms, tensors, largest=True)


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, on the first one's device: one copy from each other device."""
    home = values[0].device
    if all(value.device == home for value in values):
        return torch.stack(list(values))
    places: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        places.setdefault(value.device, []).append(index)
    rows: list[Tensor] = [values[0]] * len(values)
    for held in places.values():
        there = to_device(torch.stack([values[index] for index in held]), home)
        for index, row in zip(held, there.unbind(), strict=True):
            rows[index] = row
    return torch.stack(rows)


def by_device(first: Sequence[Tensor], *others: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
    """Tensors in parts that lie on one device each, as one operation on many takes them; ``others`` are parted as the first."""
    found: dict[torch.device, tuple[list[Tensor], ...]] = {}
    for row in zip(first, *others, strict=True):
        for part, tensor in zip(found.setdefault(row[0].device, tuple([] for _ in row)), row, strict=True):
            part.append(tensor)
    return found.values()


def sum_over_shards(values: Tensor, owners: Sequence[Tensor], *, largest: bool = False) -> Tensor:
    """Values of the parts of ``owners`` as those of the whole: the sum over the ranks that hold other parts, or the largest.

    Args:
        values: [owners, ...], one row for each.
    """
    held = [_groups_of(owner) for owner in owners]
    groups = {name: group for row in held for name, group in row.items()}
    for name, group in groups.items():
        spread = [name in row for row in held]
        if not all(spread) and not largest:  # what each rank has whole counts once
            shares = [row if apart else row / group.size() for row, apart in zip(values.unbind(), spread, strict=True)]
            values = torch.stack(shares)
        values = values.contiguous()
        dist.all_reduce(values, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return values


def sum_over_columns(values: Tensor, owner: Tensor) -> Tensor:
    """Values [units, ...] of the rows of ``owner``'s part, summed over the ranks that hold other columns of these rows."""
    for group in _groups_of(owner, rows=False).values():
        values = values.contiguous()
        dist.all_reduce(values, group=group)
    return values


def _groups_of(tensor: Tensor, *, rows: bool = True) -> dict[str, dist.ProcessGroup]:
    """The groups, by name, of which each rank holds another part of the tensor; not ``rows``: other parts of the same rows."""
    if not _is_spread(tensor):
        return {}
    mesh = tensor.device_mesh
    parts: list[tuple[int, Any]] = [(i, p) for i, p in enumerate(tensor.placements) if not (p.is_replicate() or p.is_partial())]
    groups = [mesh.get_group(i) for i, placement in parts if rows or placement.dim]
    return {group.group_name: group for group in groups}


def _is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; asked without importing their package, which takes longer than many a program."""
    return hasattr(tensor, "device_mesh")
