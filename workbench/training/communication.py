"""How copies of a model exchange gradients: pieces and their size, compression.

:func:`replicate` wraps an objective; :func:`decide_bucket` finds the size of the pieces by a measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from workbench.data.batches import Batches
from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.training.checkpoint import random_state, set_random_state
from workbench.training.communication_config import CommunicationConfig
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions
from workbench.training.lowrank import LowRank
from workbench.training.mesh import Mesh
from workbench.training.objective import Objective
from workbench.training.precision import Precision

SETTING = "communication.bucket"
DEFAULT = 25.0
"""DDP's own size in MiB; left to it, the first bucket is of 1 MiB, so that something travels early."""
CANDIDATES: tuple[float | str, ...] = (5.0, DEFAULT, 100.0, "whole")
WARM, TIMED = 3, 5
"""Steps of each candidate: the first have one bucket, fill caches, and find their buckets; the others count."""
WORTH = 0.03
"""Another size than the default is taken when it is faster by this part."""


def check_communication(config: TrainConfig, arranged: Mapping[str, int], precision: str) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: compression of what is not copies' gradients, or of gradients whose scale changes.
    """
    wanted = config.communication.compress
    if wanted == "off":
        return
    if spread := [name for name, ranks in arranged.items() if ranks > 1 and name != "replicate"]:
        raise ConfigError(
            f"communication.compress={wanted!r} is for copies of a model, and mesh.{spread[0]}={arranged[spread[0]]} splits one.",
            "Take communication.compress=off, or mesh.replicate alone.",
        )
    if wanted == "powersgd" and precision == "fp16":
        raise ConfigError(
            "communication.compress='powersgd' keeps errors of gradients, and precision='fp16' changes the scale of these.",
            "Take precision=bf16, or communication.compress=bf16.",
        )


def replicate(
    objective: Objective, config: CommunicationConfig, *, deterministic: bool = False
) -> tuple[DistributedDataParallel, LowRank | None]:
    """One of several copies of ``objective``, whose gradients are averaged in its backward pass, and what compresses them.

    Raises:
        ConfigError: powersgd with weights of several types.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, objective.constants)
    size = "whole" if config.compress == "powersgd" else DEFAULT if config.bucket == "auto" else config.bucket
    ddp = DistributedDataParallel(
        objective,
        bucket_cap_mb=1 << 20 if size == "whole" else None if size == DEFAULT else size,
        # As views of buckets, gradients shift in memory once the buckets are rebuilt, and norms of them by their last bit.
        gradient_as_bucket_view=not deterministic,
    )
    if config.compress == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        ddp.register_comm_hook(None, bf16_compress_hook)
    if config.compress != "powersgd":
        return ddp, None
    parameters = _exchanged(objective)
    if len(types := {parameter.dtype for parameter in parameters}) > 1:
        raise ConfigError(
            f"communication.compress='powersgd' takes weights of one type; these are {', '.join(sorted(map(str, types)))}.",
            "Take communication.compress=bf16 or off.",
        )
    low_rank = LowRank(parameters, config.rank, config.start)
    ddp.register_comm_hook(None, lambda state, bucket: low_rank.take(bucket))
    return ddp, low_rank


def payload(objective: Objective, config: CommunicationConfig, low_rank: LowRank | None) -> int:
    """Bytes of gradients that a rank gives to its peers each step."""
    if low_rank is not None:
        return low_rank.payload * 4
    total = exchanged_bytes(objective)
    return total // 2 if config.compress == "bf16" else total


def exchanged_bytes(objective: Objective) -> int:
    """Bytes of the gradients that copies average, and of the buckets in which they do."""
    return sum(parameter.numel() * parameter.element_size() for parameter in _exchanged(objective))


def _exchanged(objective: Objective) -> list[torch.nn.Parameter]:
    constants = set(objective.constants)
    return [p for name, p in objective.named_parameters() if p.requires_grad and name not in constants]


# -- the size of buckets, by measurement ------------------------------------------------------------------------------


def decide_bucket(
    config: TrainConfig,
    objective: Objective,
    batches: Batches,
    precision: Precision,
    compile_mode: str,
    mesh: Mesh,
    decided: Decisions,
) -> CommunicationConfig:
    """The run's exchange of gradients, with ``bucket="auto"`` decided; every rank calls it, and all decide alike.

    The weights, the gradients, the running statistics and the random states are afterwards what they were.
    """
    wanted = config.communication
    if wanted.bucket != "auto":
        return wanted
    if mesh.world.size == 1 or not mesh.plain:
        return wanted.override({"bucket": DEFAULT})  # nothing travels in buckets
    if wanted.compress == "powersgd":
        return wanted.override({"bucket": "whole"})
    if SETTING not in decided.made:
        size, reason = DEFAULT, "a compiled model is split where buckets end: to measure would be to compile once a size"
        if compile_mode == "off":
            size, reason = _fastest(config, objective, batches, precision, mesh.world)
        decided.decide(SETTING, size, reason)
    return wanted.override({"bucket": decided.made[SETTING]["value"]})


def _fastest(config: TrainConfig, objective: Objective, batches: Batches, precision: Precision, world: World) -> tuple[Any, str]:
    whole = exchanged_bytes(objective) / 2**20
    candidates = [size for size in CANDIDATES if size == "whole" or float(size) < whole]
    if candidates == ["whole"]:
        return DEFAULT, f"all gradients together, {whole:.3g} MiB, are less than a bucket"
    batch = next(iter(next(iter(batches.epoch(0)))))
    with _unchanged(objective, world):
        found = [_seconds(config, size, objective, batch, precision, world) for size in candidates]
    seconds = torch.tensor(found, dtype=torch.float64, device=world.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # as fast as the slowest rank, the same on all
    times = dict(zip(candidates, seconds.tolist(), strict=True))
    best = min(times, key=lambda size: times[size])
    usual = times.get(DEFAULT, times["whole"])
    if times[best] > (1 - WORTH) * usual:
        best = DEFAULT if DEFAULT in times else "whole"
    told = ", ".join(f"{size if size == 'whole' else f'{size:g} MiB'} {1000 * times[size]:.3g} ms" for size in candidates)
    return best, f"forward and backward pass of a micro-step by size of buckets: {told}"


def _seconds(
    config: TrainConfig, size: float | str, objective: Objective, batch: Any, precision: Precision, world: World
) -> float:
    """Median seconds of a forward and backward pass with buckets of this size."""
    wanted = config.communication.override({"bucket": size})
    ddp, _ = replicate(objective, wanted, deterministic=config.deterministic)
    x, y = batch
    times = []
    for _ in range(WARM + TIMED):
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with precision.autocast():
            loss = ddp(x, y)
        precision.backward(loss)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        objective.zero_grad(set_to_none=True)
    ddp.reducer._remove_autograd_hooks()  # else gradients would go on arriving in these buckets too
    return statistics.median(times[WARM:])


@contextmanager
def _unchanged(objective: Objective, world: World) -> Iterator[None]:
    """What a forward and backward pass changes is given back as it was: buffers, random states, gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    states = random_state(world.device)
    try:
        yield
    finally:
        objective.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        set_random_state(states, world.device)
