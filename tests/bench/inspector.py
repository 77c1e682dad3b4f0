"""What the Inspector's readings cost a training step, beside other ways of looking at every layer on every step.

    python -m tests.bench.inspector [--jobs bert resnet18 resnet50] [--modes eager captured] [--ways sampled] [--out FILE]

The jobs of ``tests.bench.training``: one batch that never changes, forward, backward and update in bf16. Of each mode the step
unread and read take turns, in blocks of steps; figures are medians of the blocks.

* ``weights``  — gradients of all parameters, and outputs of the layers with weights and of activations, every step.
* ``sampled``  — the same, but scalars of outputs from the samples that their histograms are of.
* ``every leaf`` — norms, pooling and all others too.
* ``naive``    — a forward hook a leaf and a hook a parameter: norm and histogram, each brought to the host by ``.item()``.
* ``wandb``    — what ``wandb.watch(log="gradients")`` does: ``torch.histc`` with 64 bins of every gradient, brought to the host.
* ``TensorBoard`` — ``SummaryWriter.add_histogram`` of every gradient and every leaf's output.

Other scalars are exact; all histograms are sampled (see ``workbench.probes.activations.SAMPLE``). On a CPU the
sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.peers import CUDA, DEVICE, Job, synchronize
from tests.bench.training import JOBS
from workbench.probes import PROBES, ProbeConfig, ProbeSet, StepContext
from workbench.probes.config import ActivationProbeConfig
from workbench.training.compilation import compile_whole
from workbench.training.objective import Objective

WEIGHTS = "Linear, Conv*, Embedding, *ReLU*, GELU*, SiLU, Tanh, Sigmoid, Hard*"
WAYS = (("weights", WEIGHTS, "exact"), ("sampled", WEIGHTS, "sampled"), ("every leaf", "*", "exact"))
"""By name, the layers whose outputs are read, and what their scalars are of."""
BLOCK, ROUNDS = (25, 5) if CUDA else (2, 2)
"""Steps of a block; blocks of each kind."""
WARM = 12 if CUDA else 1


def probe_set(net: nn.Module, kinds: str, moments: str = "exact") -> tuple[ProbeSet, list[int]]:
    """Probes of gradients and outputs, attached; and how many tables have come."""
    told: list[int] = []
    probes: dict[str, Any] = {
        "gradients": (PROBES.create("gradients", ProbeConfig()), 1),
        "activations": (PROBES.create("activations", ActivationProbeConfig(kinds=kinds, moments=moments)), 1),
    }
    found = ProbeSet(probes, lambda kind, step, columns: told.append(len(columns["layer"])))
    found.attach(net)
    return found, told


class Step:
    """A training step of a job on one batch, read by probes or not."""

    def __init__(self, job: Job, captured: bool, probes: Callable[[nn.Module], ProbeSet] | None = None) -> None:
        self.net = job.network()
        self.objective = Objective(self.net, nn.CrossEntropyLoss())
        self.optimizer, self.captured = job.optimizer(self.net), captured
        self.probes = probes(self.net) if probes is not None else None
        if captured:
            compile_whole(self.objective, "reduce-overhead")
        x, y = next(iter(job.loader(0)))
        self.x, self.y, self.number = job.on_device(x), y.to(DEVICE), 0

    def __call__(self, read: bool) -> None:
        self.number += 1
        if self.captured:
            torch.compiler.cudagraph_mark_step_begin()
        if read and self.probes is not None:
            self.probes.begin(self.number)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = self.objective(self.x, self.y)
        value.backward()
        if read and self.probes is not None:
            self.probes.read(StepContext(self.number))
        self.optimizer.step()
        if read and self.probes is not None:
            self.probes.updated()
        self.optimizer.zero_grad()


def in_turns(step: Callable[[bool], None]) -> tuple[float, float]:
    """Milliseconds of a step unread and read."""
    for _ in range(WARM):
        step(False)
        step(True)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for read in (False, True):
            step(read)
            synchronize()
            start = time.perf_counter()
            for _ in range(BLOCK):
                step(read)
            synchronize()
            times[read].append(1000 * (time.perf_counter() - start) / BLOCK)
    return statistics.median(times[False]), statistics.median(times[True])


# -- other ways ----------------------------------------------------------------------------------------------------------


@contextmanager
def hooked(
    net: nn.Module, of_output: Callable[[str, Tensor], None] | None, of_gradient: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hooks on every leaf layer and every parameter."""
    handles = []
    for name, module in net.named_modules():
        if of_output is not None and not any(module.children()):
            call = lambda m, a, out, name=name: of_output(name, out.detach()) if isinstance(out, Tensor) else None  # noqa: E731
            handles.append(module.register_forward_hook(call))
    for name, parameter in net.named_parameters():
        handles.append(parameter.register_hook(lambda gradient, name=name: of_gradient(name, gradient)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def naive(name: str, value: Tensor) -> None:
    value = value.float()
    value.norm().item()
    low, high = value.min().item(), value.max().item()
    torch.histc(value, 64, low, high).tolist()


def wandb_style(name: str, value: Tensor) -> None:
    flat = value.float().reshape(-1)
    low, high = flat.min().item(), flat.max().item()
    torch.histc(flat, 64, low, high).cpu().tolist()


def others(job: Job) -> Iterator[tuple[str, float, float]]:
    """(name, milliseconds of a step without, with) of the other ways, eager."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        ways: dict[str, tuple[Any, Any]] = {
            "naive": (naive, naive),
            "wandb": (None, wandb_style),
            "TensorBoard": (lambda name, value: writer.add_histogram(f"o/{name}", value.float()),
                            lambda name, value: writer.add_histogram(f"g/{name}", value.float())),
        }  # fmt: skip
        for name, (of_output, of_gradient) in ways.items():
            step = Step(job, captured=False)
            for _ in range(WARM):
                step(False)
            synchronize()
            times = []
            count = 2 if name == "TensorBoard" else 8 if CUDA else 1
            for read in (False, True):
                start = time.perf_counter()
                if read:
                    with hooked(step.net, of_output, of_gradient):
                        for _ in range(count):
                            step(False)
                else:
                    for _ in range(4 * count):
                        step(False)
                synchronize()
                times.append(1000 * (time.perf_counter() - start) / (count if read else 4 * count))
            yield name, times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "captured"), default=["captured", "eager"])
    parser.add_argument("--ways", nargs="+", choices=[way[0] for way in WAYS], default=[way[0] for way in WAYS])
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []

    def tell(job: Job, mode: str, name: str, without: float, read: float) -> None:
        rows.append({"job": job.name, "mode": mode, "way": name, "ms": without, "ms_read": read})
        print(
            f"{job.name:<9} {mode:<9} {name:<12} {without:8.2f} -> {read:8.2f} ms  {100 * (read / without - 1):+7.1f} %",
            flush=True,
        )
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(rows, indent=1))

    for job in (JOBS[name]() for name in arguments.jobs):
        for mode in arguments.modes:
            for name, kinds, moments in (way for way in WAYS if way[0] in arguments.ways):
                torch._dynamo.reset()
                torch.manual_seed(0)
                step = Step(job, mode == "captured", lambda net, kinds=kinds, moments=moments: probe_set(net, kinds, moments)[0])
                tell(job, mode, name, *in_turns(step))
                del step
        if arguments.peers:
            for name, without, read in others(job):
                tell(job, "eager", name, without, read)


if __name__ == "__main__":
    main()
