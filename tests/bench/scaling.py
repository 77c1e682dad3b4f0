"""How training gets faster with the GPUs of one host: the workbench's meshes and plain DDP, end to end, and what holds them back.

    python -m tests.bench.scaling [--jobs bert resnet50] [--gpus 1 2 4 8] [--only "copies;plain DDP"] [--out FILE]
    python -m tests.bench.scaling --draw FILE... --plot scaling.svg     # what was found before, as a table and a plot

The jobs of ``tests.bench.training`` at the same batch a GPU, in bf16, the Inspector at its default.

* ``copies``          — a copy on each GPU, compiled with its exchange of gradients and captured; in fp32 or in bf16.
* ``shard``           — weights, gradients and optimizer state spread over all GPUs (FSDP2), blocks compiled for themselves.
* ``copies of shards``, ``copies of slices`` — 2-D meshes: each copy is spread over two GPUs, or its matrices are split over two.
* ``plain DDP``       — the loop of PyTorch's tutorials.

Speed-ups are over the fastest of all on one GPU. Beside the workbench's: what its own probe of communication read on the slowest
rank, medians of the steps read. On a CPU the sizes shrink and the figures only show that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.bench import peers
from tests.bench.peers import CUDA, Job
from tests.bench.training import JOBS
from workbench import Run

CAPTURED = {"compile": "reduce-overhead"}
BLOCKS = {"compile": "default"}
WAYS: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    "copies": (1, lambda ranks: CAPTURED),
    "copies, bf16 exchange": (2, lambda ranks: CAPTURED | {"communication.compress": "bf16"}),
    "shard": (2, lambda ranks: BLOCKS | {"mesh.shard": ranks}),
    "copies of shards": (4, lambda ranks: BLOCKS | {"mesh.replicate": ranks // 2, "mesh.shard": 2}),
    "copies of slices": (4, lambda ranks: BLOCKS | {"mesh.replicate": ranks // 2, "mesh.tensor": 2}),
}
"""By name: from how many GPUs on it makes sense, and its settings for a number of them."""
PLAIN = "plain DDP"


def measured(job: Job, ranks: int, epochs: int, way: str, workers: int) -> dict[str, Any]:
    """Samples per second, and of the workbench seconds of a step."""
    if way == PLAIN:
        return {"rate": peers.plain(job, ranks, epochs, workers)}
    found: dict[str, Any] = {}

    def look(run: Run) -> None:
        readings = run.readings("communication").dropna(subset="busy")
        by_rank = readings.groupby("rank")[["busy", "waited", "exposed", "idle"]].median()
        found.update({name: float(value) for name, value in by_rank.max().items() if not math.isnan(value)})
        found["findings"] = sorted({finding.message for finding in run.findings})

    return {"rate": peers.workbench(job, ranks, epochs, WAYS[way][1](ranks), look)} | found


def told(row: dict[str, Any]) -> str:
    parts = [f"{name} {1000 * row[name]:.2f} ms" for name in ("busy", "waited", "exposed") if name in row]
    return ", ".join([*parts, *([f"idle {row['idle']:.0%}"] if "idle" in row else [])])


def beside_one(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with their speed-up over the fastest of their job on one GPU, where that is known."""
    rows = list(rows)
    alone = {job: max((r["rate"] for r in rows if r["job"] == job and r["gpus"] == 1), default=math.nan) for job in JOBS}
    return [row | {"speedup": row["rate"] / alone[row["job"]]} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each job and way, a column for each number of GPUs."""
    counts = sorted({row["gpus"] for row in rows})
    lines = [f"| | {' | '.join(f'{n} GPUs' if n > 1 else 'one GPU' for n in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for job, way in dict.fromkeys((row["job"], row["way"]) for row in rows):
        cells = []
        for count in counts:
            row = next((r for r in rows if (r["job"], r["way"], r["gpus"]) == (job, way, count)), None)
            cells.append("" if row is None else f"{row['rate']:,.0f} ({row['speedup']:.2f} ×)")
        lines.append(f"| {job}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up by number of GPUs: a panel for each job, a line for each way, the ideal dashed."""
    from matplotlib.figure import Figure

    jobs = list(dict.fromkeys(row["job"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(4.6 * len(jobs), 4), layout="constrained")
    for axes, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        of_job = [row for row in rows if row["job"] == job]
        counts = sorted({row["gpus"] for row in of_job})
        axes.plot(counts, counts, linestyle="--", color="0.6", label="ideal")
        for number, way in enumerate(ways):
            points = sorted((row["gpus"], row["speedup"]) for row in of_job if row["way"] == way)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=way)
        axes.set(title=job, xlabel="GPUs", ylabel="× the fastest on one GPU", xticks=counts, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = torch.cuda.device_count() if CUDA else 2
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["bert", "resnet50"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[count for count in (1, 2, 4, 8) if count <= here])
    parser.add_argument("--only", default="", help="names, with semicolons between; all by default")
    parser.add_argument("--epochs", type=int, default=3 if CUDA else 2)
    parser.add_argument("--workers", type=int, default=4, help="of each rank's loader of plain DDP")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--draw", type=Path, nargs="+", help="measure nothing: what these files tell")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.draw:
        rows = [row for path in arguments.draw for row in json.loads(path.read_text())]
    else:
        print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
        torch.backends.cudnn.benchmark = True
        ways = arguments.only.split(";") if arguments.only else [*WAYS, PLAIN]
        for job in (JOBS[name]() for name in arguments.jobs):
            for ranks in arguments.gpus:
                for way in ways:
                    if way in WAYS and ranks < WAYS[way][0]:
                        continue
                    try:
                        row = measured(job, ranks, arguments.epochs, way, arguments.workers)
                    except Exception as error:
                        print(f"{job.name} {ranks} × {way:<22} failed: {type(error).__name__}: {error}"[:600], flush=True)
                        continue
                    rows.append({"job": job.name, "gpus": ranks, "way": way} | row)
                    last = beside_one(rows)[-1]
                    rate = f"{last['rate']:>9,.0f} {job.unit}/s {last['speedup']:6.2f} ×"
                    print(f"{job.name} {ranks} × {way:<22} {rate}   {told(row)}", flush=True)
                    if arguments.out:
                        arguments.out.write_text(json.dumps(rows, indent=1))
                    if CUDA:
                        torch.cuda.empty_cache()
    rows = beside_one(rows)
    print(table(rows))
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
