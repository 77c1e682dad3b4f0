"""When FP8 makes one linear layer faster: a step's three products, with all rounding, against bf16.

    python -m tests.bench.fp8_layers [--rows 4096 16384] [--out FILE]

A norm, a linear layer and a GELU, forward and backward, compiled and captured as in a run; the input and its gradient are bf16,
the weight fp32. ``rule`` is what :func:`workbench.training.fp8.gains` says of the size: yes is right where the ratio is above 1.
On a CPU the sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from workbench.training import fp8

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = (
    [(768, 768), (768, 2304), (768, 3072), (3072, 768), (1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024), (2048, 8192)]
    if CUDA
    else [(32, 64), (64, 64)]
)


def milliseconds(rows: int, inputs: int, outputs: int, eighth: bool) -> float:
    """Of a forward and backward pass of a norm and a linear layer, the fastest of several rounds."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = nn.Linear(inputs, outputs)
    model = nn.Sequential(nn.LayerNorm(inputs), layer, nn.GELU()).to(DEVICE)
    if eighth:
        fp8.convert([layer])
    model.compile(mode="reduce-overhead" if CUDA else "default")
    x = torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        x.grad = None
        model.zero_grad(set_to_none=True)

    rounds, best = (20, 5) if CUDA else (2, 2), float("inf")
    for _ in range(5):
        step()
    for _ in range(rounds[1]):
        if CUDA:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds[0]):
            step()
        if CUDA:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / rounds[0])
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384] if CUDA else [64])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not CUDA:
        os.environ.setdefault(fp8.EMULATED, "emulate")
    if (missing := fp8.lacking(DEVICE)) is not None:
        print(f"skipped: FP8 takes compute capability 8.9, and {missing}")
        return
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    found = {}
    for rows in arguments.rows:
        for inputs, outputs in SIZES:
            half, eighth = (milliseconds(rows, inputs, outputs, choice) for choice in (False, True))
            found[f"{rows} × {inputs} × {outputs}"] = {"bf16": half, "fp8": eighth}
            rule = "yes" if fp8.gains(rows, inputs, outputs) else "no"
            ratio = f"{half / eighth:.2f}  rule: {rule}"
            print(f"{rows:>6} rows {inputs:>5} × {outputs:<5} bf16 {half:7.3f} ms  fp8 {eighth:7.3f} ms  {ratio}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
