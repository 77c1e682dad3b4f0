"""Process groups: who we are, how processes meet and part.

Without ``torchrun``'s environment a program is rank 0 of 1, and everything here is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import ConfigError, DeviceError


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

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
        )
    return World(rank, size, local_rank, chosen)


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
