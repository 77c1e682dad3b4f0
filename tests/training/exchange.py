"""One rank of a program that holds each way of exchanging gradients against the exact mean; rank 0 writes what it found.

``python -m torch.distributed.run --standalone --nproc-per-node=2 tests/training/exchange.py OUT``; with
``EXCHANGE_DEVICE=cuda`` on as many GPUs, else on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.data.batches import Batches, Target
from workbench.data.order import Shard
from workbench.data.splits import load_splits
from workbench.distributed import World
from workbench.training.communication import SETTING, decide_bucket, payload, replicate
from workbench.training.communication_config import CommunicationConfig
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions
from workbench.training.lowrank import LowRank
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective
from workbench.training.parallel import Parallel, parallelize
from workbench.training.precision import Precision

CUDA = os.environ.get("EXCHANGE_DEVICE") == "cuda"
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")


def objective(dtype: torch.dtype = torch.float32) -> Objective:
    """Matrices, vectors, a convolution, batch statistics, dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.Dropout(0.5),
        nn.Linear(64, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )
    return Objective(model.to(DEVICE, dtype), nn.CrossEntropyLoss())


def batch(rank: int, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    x, y = torch.randn(8, 1, 8, 8, generator=generator, dtype=dtype), torch.randint(10, (8,), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def gradients(exchanged: Any, rank: int, steps: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Of each step: those of every parameter; two micro-steps, of which the second exchanges."""
    found = []
    for step in range(steps):
        torch.manual_seed(1000 * rank + step)
        exchanged.zero_grad(set_to_none=True)
        for micro in (0, 1):
            if isinstance(exchanged, nn.parallel.DistributedDataParallel) and micro == 0:
                with exchanged.no_sync():
                    exchanged(*batch(rank, 2 * step, dtype)).backward()
            else:
                exchanged(*batch(rank, 2 * step + micro, dtype)).backward()
        found.append([parameter.grad.clone() for parameter in exchanged.parameters()])
    return found


def exact(rank: int, steps: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Means over ranks of what each computes alone."""
    found = gradients(objective(dtype), rank, steps, dtype)
    for step in found:
        for gradient in step:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return found


def distance(one: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """Length of the difference over all steps, as a share of the exact gradients'."""
    apart, whole = (torch.cat([gradient.flatten() for step in side for gradient in step]) for side in (one, other))
    return float((apart - whole).norm() / whole.norm())


def compare(rank: int) -> dict[str, Any]:
    """How far each kind of exchange is from the exact means, and what it sends."""
    found: dict[str, Any] = {}
    for name, settings in {
        "whole": {"bucket": "whole"},
        "small buckets": {"bucket": 0.05},
        "bf16": {"compress": "bf16"},
        "powersgd, exact steps": {"compress": "powersgd", "start": 9},
        "powersgd 4": {"compress": "powersgd", "start": 1, "rank": 4},
        "powersgd 16": {"compress": "powersgd", "start": 1, "rank": 16},
    }.items():
        config = CommunicationConfig(**settings)
        made = objective()
        ddp, low_rank = replicate(made, config)
        got = gradients(ddp, rank, 4, torch.float32)
        found[name] = {"distance": distance(got, exact(rank, 4, torch.float32)), "payload": payload(made, config, low_rank)}
        if low_rank is None:
            buckets = ddp._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")
            found[name]["buckets"] = len(str(buckets).split(","))
    return found


def kept(rank: int) -> dict[str, float]:
    """PowerSGD in float64: what it left out of ten steps is what its errors hold, and states go on where they were."""
    made = objective(torch.float64)
    low_rank = LowRank(list(made.parameters()), 4, 2)
    ddp = nn.parallel.DistributedDataParallel(made, bucket_cap_mb=1 << 20)
    ddp.register_comm_hook(None, lambda state, bucket: low_rank.take(bucket))
    got, expected = gradients(ddp, rank, 10, torch.float64), exact(rank, 10, torch.float64)
    left_out = [sum(e) - sum(g) for e, g in zip(zip(*expected, strict=True), zip(*got, strict=True), strict=True)]
    held = {id(p): torch.zeros_like(p) for p in made.parameters()}
    for group in low_rank._groups:
        errors = group.error.clone()
        dist.all_reduce(errors)
        held |= {id(p): e.view_as(p) / dist.get_world_size() for p, e in zip(group.parameters, errors, strict=True)}
    apart = max(float((out - held[id(p)]).abs().max()) for p, out in zip(made.parameters(), left_out, strict=True))

    again = LowRank(list(made.parameters()), 4, 2)
    for name, value in again.state(rank).items():
        value.copy_(low_rank.state(rank)[name])
    more = [torch.randn_like(p) for p in made.parameters()]
    sides = [{id(p): m.clone() for p, m in zip(made.parameters(), more, strict=True)} for _ in range(2)]
    low_rank.average(sides[0])
    again.average(sides[1])
    same = all(torch.equal(sides[0][key], sides[1][key]) for key in sides[0])
    return {"left out": max(float(out.norm()) for out in left_out), "apart": apart, "goes on": float(same)}


def recovered(rank: int) -> float:
    """Gradients of rank 3, and zeros, through factors of rank 4 in float64: how far from their mean after two steps."""
    parameters = [nn.Parameter(torch.zeros(40, 60, dtype=torch.float64, device=DEVICE)) for _ in range(2)]
    low_rank = LowRank(parameters, 4, 0)
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(60, 3, generator=generator, dtype=torch.float64).T for _ in range(2)]
    left = torch.randn(40, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    worst = 0.0
    for step in range(4):
        gradient = (left @ sides[0]).to(DEVICE)
        mean = gradient.clone()
        dist.all_reduce(mean)
        # the second is zero at first
        given = {id(parameters[0]): gradient.clone(), id(parameters[1]): gradient.clone() * (step > 1)}
        low_rank.average(given)
        expected = (mean / dist.get_world_size(), mean / dist.get_world_size() * (step > 1))
        worst = max(float((given[id(p)] - e).abs().max()) for p, e in zip(parameters, expected, strict=True))
    return worst


class Tied(nn.Module):
    """One matrix used twice, one that is frozen, one that no output depends on, odd numbers of elements, channels last."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.mixed, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = None if broken else nn.Linear(8, 8)  # which DDP does not take
        self.frozen.requires_grad_(False)
        self.head, self.broken = nn.Linear(8, 3), broken
        self.table = nn.Embedding(200, 8, padding_idx=2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(x)).relu().mean((2, 3))
        if self.broken:
            torch._dynamo.graph_break()
        rows = self.table((10 * x[:, 0].abs()).long())  # some twice, some for what is padded
        return self.head(self.mixed(self.frozen(self.mixed(hidden)))) + rows.mean((1, 2))[:, :3]


def compiled(world: World) -> dict[str, Any]:
    """Gradients averaged within the compiled backward pass against the exact means, and which way was taken; sizes vary."""
    found: dict[str, Any] = {}
    mesh = Mesh({"replicate": world.size, "shard": 1}, world)
    for name, broken, settings in [
        ("small buckets", False, {"bucket": 0.0005}),
        ("whole", False, {"bucket": "whole"}),
        ("bf16", False, {"compress": "bf16"}),
        ("in parts", True, {}),
    ]:
        sides = []
        for alone in (True, False):
            torch.manual_seed(world.rank)  # what the ranks begin with is the first one's
            made = Objective(Tied(broken).to(DEVICE), nn.CrossEntropyLoss())
            if alone:
                for parameter in made.parameters():
                    dist.broadcast(parameter.detach(), src=0)
            mode = "reduce-overhead" if CUDA else "default"
            joined = Parallel(made) if alone else parallelize(made, mesh, mode, communication=CommunicationConfig(**settings))
            sides.append([])
            for step in range(3):
                generator = torch.Generator().manual_seed(10 * step + world.rank)
                size = (6, 6, 5 + world.rank)[step]
                x, y = torch.randn(size, 3, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator)
                joined.forward(x.to(DEVICE, memory_format=torch.channels_last), y.to(DEVICE)).backward()
                got = {key: p.grad.clone() for key, p in made.named_parameters() if p.grad is not None}
                if alone:
                    for gradient in got.values():
                        dist.all_reduce(gradient)
                        gradient /= world.size
                sides[-1].append(got)
                made.zero_grad(set_to_none=True)
        same = [list(one) == list(other) for one, other in zip(*sides, strict=True)]
        strides = all(p.grad is None or p.grad.stride() == p.stride() for p in made.parameters())
        flat = [[[step[key] for key in sorted(step)] for step in side] for side in sides]
        found[name] = {
            "distance": distance(flat[1], flat[0]),
            "names": all(same) and strides and len(sides[0][0]) == 9,
            "way": type(joined).__name__ if joined.marked is not None else "DDP",
            "payload": joined.payload,
        }
    return found


def measured(world: World) -> dict[str, Any]:
    """The size of buckets by measurement; what it leaves as it was."""
    config = TrainConfig(data={"name": "digits", "limit": 64, "batch_size": 16}, communication={"bucket": "auto"})
    batches = Batches(load_splits(config.data), config.data, Shard(world.rank, world.size), Target(world.device), 0)
    made, decided, mesh = objective(), Decisions(), Mesh({"replicate": world.size, "shard": 1}, world)
    made.model.append(nn.Linear(10, 10))
    made.model.insert(4, nn.Linear(64, 64))
    big = nn.Linear(1024, 2048)
    made.model[3] = nn.Sequential(big, nn.Linear(2048, 64))  # more than a bucket of 5 MiB
    made.to(DEVICE)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    state = torch.get_rng_state()
    wanted = decide_bucket(config, made, batches, Precision("fp32", world.device), "off", mesh, decided)
    same = all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    clean = all(parameter.grad is None for parameter in made.parameters())
    unchanged = same and clean and torch.equal(state, torch.get_rng_state())
    alone = gradients(made, world.rank, 1, torch.float32)  # nothing of what was tried is still attached
    again = gradients(made, world.rank, 1, torch.float32)
    reused = decide_bucket(config, made, batches, Precision("fp32", world.device), "off", mesh, decided)
    return {
        "bucket": wanted.bucket,
        "reason": decided.made[SETTING]["reason"],
        "unchanged": unchanged,
        "detached": distance(alone, again),
        "reused": reused == wanted,
    }


def main() -> None:
    if CUDA:
        torch.cuda.set_device(DEVICE)
        torch.use_deterministic_algorithms(True)
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=DEVICE if CUDA else None)
    world = World(dist.get_rank(), dist.get_world_size(), device=DEVICE)
    found = {
        "compare": compare(world.rank),
        "kept": kept(world.rank),
        "recovered": recovered(world.rank),
        "measured": measured(world),
        "compiled": compiled(world),
    }
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, found)
    if world.main:
        Path(sys.argv[1]).write_text(json.dumps(everywhere))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
