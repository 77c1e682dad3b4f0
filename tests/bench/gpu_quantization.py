"""INT8 and FP8 products on a GPU against bf16, all compiled and captured: latency in turns, relative error, agreement.

    python -m tests.bench.gpu_quantization --minutes 4 --profile "vit 32" --out out/gpu-quantization.json
    python -m tests.bench.gpu_quantization --minutes 6 --tune --shapes "vit 32" "bert 32 × 128"
    python -m tests.bench.gpu_quantization --small            # on a CPU too, to try the program itself

Each variant has its own process: they compile at the same time (one at a time with ``--tune``, which times kernels), then take
turns on the GPU, so that a failure of one leaves the others alone. Random weights and inputs, so no accuracies: ``error`` is the
distance of the outputs from fp32's, ``agreement`` the share of samples with the same highest output (among the two of the text
model, near ties count against it). ``torchao`` stands for its own INT8 and FP8 layers, compiled and captured in the same way.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench import QuantConfig
from workbench.compress import compiled
from workbench.compress.compilation import import_quietly
from workbench.compress.gpu import ReducedModel, quantizable_layers, reduced
from workbench.compress.latency import latency_of
from workbench.models import ModelConfig, build_model

ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Make = Callable[[int], Tensor]


def texts(batch: int, length: int) -> Make:
    return lambda seed: torch.randint(1, 8000, (batch, length), generator=torch.Generator().manual_seed(seed))


def images(batch: int) -> Make:
    return lambda seed: torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


MODELS = {"bert": "bert_base", "vit": "vit_base_patch16_224"}
SMALL = {"bert": "bert_small", "vit": "vit_tiny_patch16_224"}
SHAPES: dict[str, Make] = {
    "bert 32 × 128": texts(32, 128),
    "vit 32": images(32),
    "bert 1 × 128": texts(1, 128),
    "vit 1": images(1),
    "bert 32 × 512": texts(32, 512),
    "vit 128": images(128),
}
CALIBRATION = {"bert": texts(32, 128), "vit": images(32)}
AFTER_ATTENTION = {"bert": ["*.attention.output.dense"], "vit": ["*.attn.proj"]}
"""Layers whose input no kernel of the compiler computes, so that rounding it costs a kernel of its own."""

FP8, STATIC = QuantConfig(mode="fp8", backend="cuda"), QuantConfig(mode="static", backend="cuda")
CHANNEL = FP8.override({"granularity": "channel"})
VARIANTS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "bf16": lambda model, case: ReducedModel(model),
    "bf16, PyTorch's patch convolution": lambda model, case: convolving(model, case),
    "fp8 static": lambda model, case: made(model, FP8, case, calibrated=True),
    "fp8 static, by channel": lambda model, case: made(model, CHANNEL, case, calibrated=True),
    "fp8 static, attention's bf16": lambda model, case: made(
        model, FP8.override({"keep_float": AFTER_ATTENTION[case]}), case, calibrated=True
    ),
    "fp8 dynamic": lambda model, case: made(model, FP8, case),
    "int8 static": lambda model, case: made(model, STATIC, case, calibrated=True),
    "int8 dynamic": lambda model, case: made(model, STATIC.override({"mode": "dynamic"}), case),
    "torchao fp8": lambda model, case: torchao(model, "Float8DynamicActivationFloat8WeightConfig"),
    "torchao int8": lambda model, case: torchao(model, "Int8DynamicActivationInt8WeightConfig"),
}
CUDNN = "cudnn attention"
VARIANTS |= {f"{name}, {CUDNN}": VARIANTS[name] for name in ("bf16", "fp8 static")}
TUNED = ["bf16", "fp8 static", "int8 static"]


def made(model: nn.Module, config: QuantConfig, case: str, calibrated: bool = False) -> nn.Module:
    return reduced(model, config, [CALIBRATION[case](2)] if calibrated else [])[0]


class Plain(nn.Module):
    """A model in bf16 as PyTorch alone would compile it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(torch.bfloat16)).float()


def convolving(model: nn.Module, case: str) -> nn.Module:
    if case == "bert":
        raise ValueError("it has none")
    return Plain(model)


def torchao(model: nn.Module, recipe: str) -> nn.Module:
    ao = import_quietly("torchao.quantization")
    chosen = set(quantizable_layers(model, FP8))
    module = ReducedModel(model)
    config = getattr(ao, recipe)(granularity=ao.PerRow(), set_inductor_config=False)
    ao.quantize_(module.model, config, filter_fn=lambda layer, name: name in chosen)
    return module.requires_grad_(False)


def quality(output: Tensor, reference: Tensor) -> dict[str, float]:
    return {
        "error": ((output - reference).norm() / reference.norm()).item(),
        "agreement": (output.argmax(1) == reference.argmax(1)).float().mean().item(),
    }


# -- a variant's own process --------------------------------------------------------------------------------------------


def work(variant: str, shapes: list[str], small: bool, compiling: Any, tune: bool, end: float, link: Connection) -> None:
    """Compile ``variant`` for each shape, then do what the parent asks: time a shape, or profile it."""
    torch.set_num_threads(2)
    sources: dict[str, nn.Module] = {}
    models: dict[str, nn.Module] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for shape in shapes:
        case = shape.split()[0]
        with compiling:
            if time.time() > end:
                link.send((shape, {"failed": "out of time"}))
                continue
            start = time.perf_counter()
            try:
                if case not in models:
                    torch.manual_seed(0)
                    name = (SMALL if small else MODELS)[case]
                    config = ModelConfig(name=name, num_classes=1000 if case == "vit" else 2)
                    sources[case] = build_model(config).eval().to(DEVICE)
                    models[case] = VARIANTS[variant](copy.deepcopy(sources[case]), case)
                x = SHAPES[shape](1)[: 2 if small else None].to(DEVICE)
                with torch.no_grad():
                    reference = sources[case](x[:32]).float()
                fast = compiled(models[case], tune=tune)
                # The first call is traced, and keeps the kernel of attention that was preferred then.
                with sdpa_kernel(list(ATTENTION), set_priority=True) if CUDNN in variant else nullcontext():
                    facts: dict[str, Any] = quality(fast(x)[:32].float(), reference)
                calls[shape] = lambda fast=fast, x=x: fast(x)  # type: ignore[misc]
                link.send((shape, facts | {"compile_s": time.perf_counter() - start}))
            except Exception as error:
                link.send((shape, {"failed": f"{type(error).__name__}: {error}"[:250].replace("\n", " ")}))
    link.send(None)
    while (order := link.recv()) is not None:
        task, shape = order
        if task == "time":
            link.send(latency_of({"": calls[shape]}, rounds=60, seconds=0.25)[""])
        else:
            link.send(kernels(calls[shape]))


def kernels(call: Callable[[], Any], repeats: int = 10) -> list[tuple[str, float, float]]:
    """(kernel, launches a call, microseconds a call), the costliest first."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if DEVICE.type == "cuda" else activity.CPU]) as profile:
        for _ in range(repeats):
            call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    found = {
        event.key: (event.count, event.self_device_time_total or event.self_cpu_time_total) for event in profile.key_averages()
    }
    rows = [(name, count / repeats, us / repeats) for name, (count, us) in found.items() if us]
    return sorted(rows, key=lambda row: -row[2])


# -- the parent ---------------------------------------------------------------------------------------------------------


class Worker:
    """A variant's process; once it has ended or hangs, it answers nothing more."""

    def __init__(self, variant: str, *settings: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.link, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(variant, *settings, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.facts: dict[str, dict[str, Any]] = {}
        self.alive = True

    def answer(self, timeout: float) -> Any:
        try:
            if self.link.poll(max(0.0, timeout)):
                return self.link.recv()
        except (EOFError, OSError):
            pass
        self.alive = False
        return None

    def collect(self, shapes: list[str], end: float) -> None:
        while (found := self.answer(end - time.time())) is not None:
            self.facts[found[0]] = found[1]
        for shape in shapes:
            self.facts.setdefault(shape, {"failed": "its process ended or took too long"})

    def ask(self, task: str, shape: str) -> Any:
        if not self.alive or "failed" in self.facts[shape]:
            return None
        self.link.send((task, shape))
        return self.answer(60)


def table(rows: list[tuple[str, float, float]], top: int) -> str:
    shown = [f"  {us:8.1f} µs  {launches:5.1f} ×  {short(name)}" for name, launches, us in rows[:top]]
    rest = sum(us for _, _, us in rows[top:])
    total, launches = sum(us for _, _, us in rows), sum(count for _, count, _ in rows)
    return "\n".join([*shown, f"  {rest:8.1f} µs  others;  {total:.1f} µs and {launches:.0f} kernels in all"])


def short(name: str) -> str:
    return re.sub(r"^(void |std::)+|at::native::|\(anonymous namespace\)::|<unnamed>::", "", name)[:84]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--minutes", type=float, default=4, help="the first half of which is for beginning to compile")
    parser.add_argument("--tune", action="store_true", help="time several kernels for each product while compiling")
    parser.add_argument("--profile", choices=list(SHAPES), help="kernels of a call, of bf16 and the fastest other variant")
    parser.add_argument("--small", action="store_true", help="small models and two samples")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.time()
    shapes = arguments.shapes
    variants = arguments.variants or (TUNED if arguments.tune else [name for name in VARIANTS if CUDNN not in name])
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(12 if arguments.tune else 2))
    print(torch.__version__, torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", flush=True)
    spawn = multiprocessing.get_context("spawn")
    compiling = spawn.Lock() if arguments.tune else spawn.Semaphore(len(variants))
    last = started + 30 * arguments.minutes
    workers = {v: Worker(v, shapes, arguments.small, compiling, arguments.tune, last) for v in variants}
    for worker in workers.values():
        worker.collect(shapes, started + 50 * arguments.minutes)
    print(f"compiled after {time.time() - started:.0f} s", flush=True)

    rows: list[dict[str, Any]] = []
    for shape in shapes:
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(3):
            for variant, worker in workers.items():
                taken[variant] += worker.ask("time", shape) or []
        for variant, worker in workers.items():
            facts = dict(worker.facts[shape])
            if taken[variant]:
                facts["ms"] = statistics.median(taken[variant])
                if taken.get("bf16"):
                    facts["speedup"] = statistics.median(taken["bf16"]) / facts["ms"]
            rows.append({"shape": shape, "variant": variant, **facts})
            print(f"{shape:14}{variant:37}" + "  ".join(f"{k} {shown(v)}" for k, v in facts.items()), flush=True)
    if arguments.profile:
        timed = [row for row in rows if row["shape"] == arguments.profile and "ms" in row and row["variant"] != "bf16"]
        best = min(timed, key=lambda row: row["ms"])["variant"] if timed else None
        for variant in filter(None, ("bf16", best)):
            if variant in workers and (found := workers[variant].ask("profile", arguments.profile)):
                print(f"{arguments.profile}, {variant}:\n{table(found, 14)}", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1))
    for worker in workers.values():
        worker.process.kill()


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
