"""How exact readings are: every statistic against float64, by type and size; and on every mesh of two ranks against one process.

    python -m tests.bench.readings [--largest 28] [--meshes "shard=2" ...] [--no-sizes] [--out FILE]

Tensors have 0 to 2^28 elements (``--largest``), of magnitudes over eight decades, with zeros; once as they are, once with
denormals, once with NaN and both infinities. Reported: the largest difference of a mean as a share of the mean magnitude, of the
norm and the standard deviation as shares of themselves; and how many smallest and largest elements, counts of zeros and of
non-finite elements, and bins of the sample's histogram are not the same: these are to be exact. On CUDA where there is some.

Meshes train a small BERT for four steps in fp32; readings of gradients and of outputs of all layers are compared step by step,
outputs as means over all ranks. Parameters whose gradient is nothing but rounding are left out: that of the bias of attention's
keys, say, which changes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.bench.meshes import TWO, given, on
from workbench import Run, TrainConfig, train
from workbench.probes.base import ACTIVATIONS
from workbench.probes.kernels import HEAD, Tally

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAMPLE = 4096
CHUNK = 1 << 24


def sizes(largest: int) -> list[int]:
    return [0, 1, 2, 3, 31, 1023, 4097, 100_003, *(2**power + odd for power in (20, 24, 26) for odd in (0, 7) if power < largest),
            2**largest]  # fmt: skip


def tensor(count: int, dtype: torch.dtype, planted: str) -> Tensor:
    """[count] of magnitudes from 1e-4 to 1e4, a tenth of them zero."""
    generator = torch.Generator(DEVICE).manual_seed(count)
    value = torch.empty(count, dtype=dtype, device=DEVICE)
    for part in value.split(CHUNK):
        random = torch.rand(3, len(part), generator=generator, device=DEVICE)
        part.copy_(torch.where(random[0] < 0.1, 0.0, 10 ** (8 * random[1] - 4) * (random[2] - 0.4)))
    if planted == "denormals":
        value[::3] = torch.finfo(dtype).smallest_normal / 4
    if planted == "not finite":
        value[::5], value[1::7], value[2::11] = math.nan, math.inf, -math.inf
    return value


def compared(value: Tensor, tally: Tally) -> dict[str, float]:
    """Differences of what ``tally`` finds of ``value`` from what float64 gives."""
    if value.numel():
        tally.record(0, value)
    found = tally.finish()[0].cpu()
    count, total, square, zeros, broken, low, high, sampled = found[:8].tolist()
    wrong = int(count != value.numel())
    if not value.numel():
        return {"wrong": wrong}
    sums = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64, device=DEVICE)
    for part in value.split(CHUNK):
        x = part.double()
        sums += torch.stack([x.sum(), x.abs().sum(), (x * x).sum(), (x == 0).sum().double(), (~x.isfinite()).sum().double()])
        ends = torch.stack([torch.minimum(ends[0], x.amin()), torch.maximum(ends[1], x.amax())])
    s, magnitude, s2, z, n = sums.tolist()
    same = [(zeros, z), (broken, n), (low, float(ends[0])), (high, float(ends[1]))]
    wrong += sum(not (a == b or (math.isnan(a) and math.isnan(b))) for a, b in same)
    sample = tally.samples[0, : int(sampled)].float().cpu()
    place = ACTIVATIONS.place(sample)
    counts = torch.bincount(place[place < ACTIVATIONS.count], minlength=ACTIVATIONS.count)
    wrong += int((counts != found[HEAD:]).sum()) + int(sampled != min(value.numel(), SAMPLE))
    if n:
        return {"wrong": wrong + int(not math.isnan(total))}
    mean, spread = total / count, math.sqrt(max(square / count - (total / count) ** 2, 0.0))
    expected = math.sqrt(max(s2 / count - (s / count) ** 2, 0.0))
    return {
        "wrong": wrong,
        "mean": abs(mean - s / count) / (magnitude / count or 1.0),
        "norm": abs(math.sqrt(square) - math.sqrt(s2)) / (math.sqrt(s2) or 1.0),
        "std": abs(spread - expected) / expected if expected > 1e-6 * math.sqrt(s2 / count) else 0.0,
    }


def by_size(largest: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in TYPES:
        tally = Tally([0], SAMPLE, ACTIVATIONS, DEVICE)
        for planted in ("", "denormals", "not finite"):
            worst: dict[str, float] = {}
            for count in sizes(largest):
                for name, apart in compared(tensor(count, dtype, planted), tally).items():
                    worst[name] = worst.get(name, 0) + apart if name == "wrong" else max(worst.get(name, 0.0), apart)
            rows.append({"type": str(dtype).split(".")[1], "with": planted or "finite numbers", **worst})
            told = ", ".join(f"{name} {worst[name]:.1e}" for name in ("mean", "norm", "std") if name in worst)
            print(f"{rows[-1]['type']:<9} {rows[-1]['with']:<15} not the same: {worst['wrong']:g}   {told}", flush=True)
    return rows


# -- meshes --------------------------------------------------------------------------------------------------------------


def read(mesh: str, config: TrainConfig, root: str) -> Run:
    return on(config, mesh, root) if mesh else train(config, root=root).run


def apart(one: Run, other: Run) -> dict[str, float]:
    """Largest differences as shares of the larger one; of outputs, as shares of the standard deviation."""
    keys, found = ["step", "layer"], {}
    ours, theirs = (run.readings("gradients").drop_duplicates(keys).set_index(keys).sort_index() for run in (one, other))
    assert list(ours.index) == list(theirs.index)
    real = ours["norm"] > 1e-6 * ours["norm"].groupby("step").transform("max")
    found["parameters compared"] = float(real.mean())
    for name in ("norm", "max", "mean", "std", "zeros", "weight_norm"):
        size = ours["std"] if name == "mean" else 1.0 if name == "zeros" else ours[name]
        found[f"gradient {name}"] = float(np.max((np.abs(ours[name] - theirs[name]) / size)[real]))
    outputs = []
    for run in (one, other):
        table = run.readings("activations")
        table["total"] = table["mean"] * table["count"]
        merged = table.groupby(keys).agg(
            count=("count", "sum"), total=("total", "sum"), std=("std", "max"), zeros=("zeros", "mean")
        )
        outputs.append(merged.assign(mean=merged["total"] / merged["count"]))
    ours, theirs = (table.loc[outputs[0].index.intersection(outputs[1].index)] for table in outputs)
    found["outputs compared"] = len(ours) / len(outputs[0])
    found["output mean"] = float(np.max(np.abs(ours["mean"] - theirs["mean"]) / np.maximum(ours["std"], 1e-12)))
    return found


def by_mesh(meshes: list[str]) -> list[dict[str, Any]]:
    changes = {"max_steps": 4, "probes.gradients.every": 1, "probes.activations.every": 1, "clip.mode": "off"}
    config = given("bert").override({**changes, "device": DEVICE.type})
    rows = []
    with tempfile.TemporaryDirectory() as root:
        one = read("", config, root)
        for mesh in meshes:
            rows.append({"mesh": mesh, **apart(one, read(mesh, config, root))})
            print(
                f"{mesh:<13} " + ", ".join(f"{name} {value:.1e}" for name, value in rows[-1].items() if name != "mesh"),
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=28, help="power of two of the largest tensor's elements")
    parser.add_argument("--meshes", nargs="*", default=list(TWO))
    parser.add_argument("--sizes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, torch {torch.__version__}", flush=True)
    found = {"sizes": by_size(arguments.largest) if arguments.sizes else [], "meshes": by_mesh(arguments.meshes)}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
