"""INT8 and FP8 products on a GPU against bf16, all compiled: latency in turns, relative error, agreement.

    python -m tests.bench.gpu_quantization --out out/gpu-quantization.json
    python -m tests.bench.gpu_quantization --only vit --minutes 3

Random weights and inputs, so no accuracies: ``error`` is the distance of the outputs from fp32's, ``agreement`` the share
of samples with the same highest output (among the two of the text model, near ties count against it).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench import QuantConfig, quantize
from workbench.compress import compiled
from workbench.compress.gpu import ReducedModel
from workbench.compress.latency import latency_of
from workbench.models import ModelConfig, build_model

VARIANTS = {
    "int8": QuantConfig(mode="dynamic", backend="cuda"),
    "fp8": QuantConfig(mode="fp8", backend="cuda"),
    "fp8 tensor": QuantConfig(mode="fp8", backend="cuda", granularity="tensor"),
}
Make = Callable[[torch.Generator], Tensor]


def texts(batch: int, length: int) -> Make:
    return lambda generator: torch.randint(1, 30000, (batch, length), generator=generator)


def images(batch: int) -> Make:
    return lambda generator: torch.randn(batch, 3, 224, 224, generator=generator)


CASES: dict[str, tuple[str, dict[str, Make]]] = {
    "bert": (
        "bert_base",
        {"1 × 128": texts(1, 128), "32 × 128": texts(32, 128), "1 × 512": texts(1, 512), "32 × 512": texts(32, 512)},
    ),
    "vit": ("vit_base_patch16_224", {"32": images(32), "1": images(1), "128": images(128)}),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, num_classes=None if name.startswith("vit") else 2)).eval()


def quality(output: Tensor, reference: Tensor) -> dict[str, float]:
    return {
        "error": ((output - reference).norm() / reference.norm()).item(),
        "agreement": (output.argmax(1) == reference.argmax(1)).float().mean().item(),
    }


def measure(name: str, shapes: dict[str, Make], over: Callable[[], bool], tune: bool) -> list[dict[str, Any]]:
    """One row a shape and variant; a variant that can't be made or compiled says why."""
    model = built(name)
    models: dict[str, nn.Module] = {"bf16": ReducedModel(built(name).cuda())}
    failed: dict[str, str] = {}
    for variant, config in VARIANTS.items():
        try:
            models[variant] = quantize(model, config)
        except Exception as error:
            failed[variant] = f"{type(error).__name__}: {error}"
    exact, rows = model.cuda(), []
    for shape, make in shapes.items():
        if over():
            print(f"{name} {shape}: out of time", flush=True)
            continue
        x = make(torch.Generator().manual_seed(1)).cuda()
        with torch.no_grad():
            reference = exact(x).float()
        calls: dict[str, Callable[[], Any]] = {}
        found: dict[str, dict[str, Any]] = {variant: {"failed": why} for variant, why in failed.items()}
        for variant, module in models.items():
            start = time.perf_counter()
            try:
                fast = compiled(module, tune=tune and variant == "int8")
                found[variant] = quality(fast(x).float(), reference)
            except Exception as error:
                found[variant] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                continue
            found[variant]["compile_s"] = time.perf_counter() - start
            calls[variant] = partial(fast, x)
        for variant, taken in latency_of(calls, rounds=60, seconds=3).items():
            found[variant]["ms"] = statistics.median(taken)
        for variant, facts in found.items():
            if "ms" in facts and "ms" in found["bf16"]:
                facts["speedup"] = found["bf16"]["ms"] / facts["ms"]
            rows.append({"model": name, "shape": shape, "variant": variant, **facts})
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--minutes", type=float, default=4, help="no shape is begun after so long")
    parser.add_argument("--tune", action="store_true", help="time several INT8 kernels while compiling (minutes)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    rows: list[dict[str, Any]] = []
    for case, (name, shapes) in CASES.items():
        if arguments.only in (None, case):
            rows += measure(name, shapes, lambda: time.monotonic() > end, arguments.tune)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
