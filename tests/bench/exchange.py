"""What the exchange of gradients costs a step, by way of exchanging: each as a share of the speed of ranks that exchange nothing.

    python -m tests.bench.exchange [--jobs bert resnet50] [--ranks 2] [--ways "within, bf16;DDP, captured"] [--out FILE]

The jobs of ``tests.bench.training``, one batch that never changes on each rank: forward, backward and update in bf16, captured
where not said otherwise.

* ``alone``         — every rank for itself.
* ``within``        — gradients averaged within the compiled pass, in fp32 or bf16, in buckets of 25 MiB, of others, or whole;
  ``in order``: without computing other gradients while a large one travels. What NCCL may take of a GPU: ``NCCL_MAX_CTAS``.
* ``DDP``           — DistributedDataParallel around the compiled objective, and around the eager one: plain PyTorch.
* ``shard``         — weights, gradients and optimizer state spread over the ranks (FSDP2), blocks compiled for themselves.

All ways run in the same processes, one after another; figures are medians of blocks of steps. On a CPU the sizes shrink and the
figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.bench.peers import CUDA, DEVICE, Job, synchronize
from tests.bench.training import JOBS
from workbench.distributed import World
from workbench.training import reduction
from workbench.training.communication_config import CommunicationConfig
from workbench.training.compilation import compile_whole
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective
from workbench.training.parallel import Parallel, Replicated, parallelize

SHADE = reduction.SHADE
CAPTURED = "reduce-overhead" if CUDA else "default"
WARM, BLOCK, BLOCKS = (12, 30, 5) if CUDA else (1, 2, 2)
WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "within, fp32": {"compress": "off"},
    "within, bf16": {"compress": "bf16"},
    "within, fp32, in order": {},
    "within, fp32, 8 MiB": {"bucket": 8.0},
    "within, fp32, 100 MiB": {"bucket": 100.0},
    "within, fp32, whole": {"bucket": "whole"},
    "DDP, captured": {},
    "DDP, eager": {},
    "shard": {},
}


def joined(way: str, objective: Objective, world: World) -> Parallel:
    """``objective`` on this rank, joined with the others in one way."""
    plain = Mesh({"replicate": world.size, "shard": 1}, world)
    settings = CommunicationConfig(**WAYS[way])
    reduction.SHADE = 0.0 if way.endswith("in order") else SHADE
    match way.split(", "):
        case ["alone"]:
            compile_whole(objective, CAPTURED)
            return Parallel(objective)
        case ["DDP", kind]:
            if kind == "captured":
                compile_whole(objective, CAPTURED)
            return Replicated(objective, settings, world, False)
        case ["shard"]:
            return parallelize(objective, Mesh({"replicate": 1, "shard": world.size}, world), "default")
    return parallelize(objective, plain, CAPTURED, communication=settings)


def milliseconds(way: str, job: Job, world: World) -> float:
    """Of a step; the median of the slowest rank's blocks."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net = job.network()
    parallel = joined(way, Objective(net, nn.CrossEntropyLoss()), world)
    optimizer = job.optimizer(net)
    x, y = next(iter(job.loader(0)))
    x, y = job.on_device(x), y.to(DEVICE)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with parallel.micro_step(last=True):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = parallel.forward(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM):
        step()
    times = []
    for _ in range(BLOCKS):
        synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(BLOCK):
            step()
        synchronize()
        times.append(1000 * (time.perf_counter() - start) / BLOCK)
    slowest = torch.tensor(statistics.median(times), device=DEVICE)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def as_rank(arguments: argparse.Namespace) -> None:
    local = int(os.environ["LOCAL_RANK"])
    if CUDA:
        torch.cuda.set_device(local)
    torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl" if CUDA else "gloo", device_id=torch.device("cuda", local) if CUDA else None)
    world = World(dist.get_rank(), dist.get_world_size(), device=torch.device("cuda", local) if CUDA else DEVICE)
    found: dict[str, dict[str, float]] = {}
    for job in (JOBS[name]() for name in arguments.jobs):
        for way in WAYS if not arguments.ways else arguments.ways.split(";"):
            try:
                figures = found.setdefault(job.name, {})
                figures[way] = milliseconds(way, job, world)
            except Exception as error:  # on all ranks alike
                if world.main:
                    print(f"{job.name:<9} {way:<24} failed: {type(error).__name__}: {error}"[:400], flush=True)
                continue
            if CUDA:
                torch.cuda.empty_cache()
            if world.main:
                beside = f"   {world.size * figures['alone'] / figures[way]:.3f} × one" if "alone" in figures else ""
                rate = 1000 * job.batch * world.size / figures[way]
                print(f"{job.name:<9} {way:<24} {figures[way]:8.2f} ms  {rate:>9,.0f} {job.unit}/s{beside}", flush=True)
                if arguments.out is not None:
                    arguments.out.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["bert", "resnet50"])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if CUDA else 2)
    parser.add_argument("--ways", default="", help="names, with semicolons between; all by default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        as_rank(arguments)
        return
    print(f"{arguments.ranks} × {torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "-m", "tests.bench.exchange", *sys.argv[1:]], check=True, env=environment)


if __name__ == "__main__":
    main()
