"""The Inspector's page in a real JupyterLab while a large run trains: what it costs the kernel, the wire and the browser.

    python -m tests.bench.page                      # two minutes: 161 layers, an hour's readings compressed
    python -m tests.bench.page --seconds 3600 --readings 3600
    python -m tests.bench.page --before 3600        # two minutes of a run that has trained for an hour

A run of 161 parameters is written beforehand and replayed: its events and readings appear in another folder at the wanted pace,
as a trainer would write them. Reported: resident memory of the kernel and the page's JavaScript heap, before and after; bytes a
refresh; milliseconds a redraw, by the clock and of the page's processor time; the kernel's share of a processor; and how long
after a reading had come to the trainer's host its column stood on the screen.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from workbench.training.recorder import Recorder

CELL = """from widgets import Inspector
inspector = Inspector({name!r})
inspector"""

# The page's clock when a column first stood on the screen, by step: the frame after the plot that holds it was drawn.
WATCH = """() => {
    window.__seen = {};
    const plot = () => document.querySelector('.wi-card[data-card=gradients] .js-plotly-plot');
    let last = 0;
    const look = () => {
        const x = plot()?.data?.[0]?.x;
        if (x?.length && x.at(-1) !== last) { last = x.at(-1); window.__seen[last] ??= Date.now() / 1000; }
        requestAnimationFrame(look);
    };
    look(); }"""


CAUGHT_UP = """(step) => {
    const x = document.querySelector('.wi-card[data-card=gradients] .js-plotly-plot')?.data?.[0]?.x;
    return x?.length && x.at(-1) >= 0.98 * step; }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="how long the replay takes")
    parser.add_argument("--readings", type=int, default=720, help="readings replayed, one each five steps")
    parser.add_argument("--before", type=int, default=10, help="readings that are there when the page opens")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    chosen = parser.parse_args()
    figures = measure(chosen.seconds, chosen.readings, chosen.before)
    print(json.dumps(figures, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=2))


def measure(seconds: float, readings: int, first: int) -> dict[str, Any]:
    """Replay ``readings`` over ``seconds`` into a notebook that shows them and the ``first`` before."""
    from playwright.sync_api import sync_playwright

    from tests.ui.conftest import CHROMIUM_FLAGS, Lab, find_chromium
    from tests.widgets.simulated import Simulation

    executable = find_chromium()
    if executable is None:
        raise SystemExit("This benchmark needs Chromium: install it, or run 'playwright install chromium'.")
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        lab = Lab(Path(home), browser)
        try:
            simulation = Simulation(lab.runs / "replayed", total=5 * (readings + first), blocks=(9, 9, 8), rich=True)
            simulation.until(5 * first)
            recorder = Recorder(simulation.folder, simulation.attempt, 0)
            simulation.writers = [Through(recorder)]
            path = lab.notebook("page.ipynb", CELL.format(name="replayed"))
            book = lab.open(path, width=1280, height=1100)
            book.run_all()
            book.page.locator(".wi-card").first.wait_for()
            book.page.evaluate("() => document.querySelector('.wb-inspector').scrollIntoView()")
            book.page.locator(".wi-card[data-card=gradients] .js-plotly-plot").wait_for()  # plotly.js is there: once a page
            book.page.wait_for_function(CAUGHT_UP, arg=5 * first)
            book.page.evaluate(WATCH)
            session = book.page.context.new_cdp_session(book.page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            writing: list[float] = []
            before = _costs(book, session)
            written: dict[int, float] = {}
            started = time.monotonic()
            for index in range(readings):
                began = time.perf_counter()
                simulation.step()
                writing.append(time.perf_counter() - began)
                written[simulation.at] = time.time()
                # Until it is due, the browser's own loop runs, not this one.
                due = started + (index + 1) * seconds / readings - time.monotonic()
                if due > 0:
                    book.page.wait_for_timeout(1000 * due)
            book.page.wait_for_timeout(3000)
            took = time.monotonic() - started
            after = _costs(book, session)
            seen = {int(float(step)): at for step, at in book.page.evaluate("() => window.__seen").items()}
            summary = eval(book.result("inspector.stats.summary()"))
            errors = book.errors
            recorder.close()
        finally:
            lab.close()
            browser.close()
    # A reading that shares a refresh with later ones stands on the screen when the latest of them does.
    marks = sorted(seen)
    delays = []
    for step, at in written.items():
        place = int(np.searchsorted(marks, step))
        if place < len(marks):
            delays.append(seen[marks[place]] - at)
    return {
        "parameters": len(simulation.parameters),
        "layers": len(simulation.modules),
        "readings": readings,
        "seconds": round(took, 1),
        "processors": os.cpu_count(),
        "load": [round(v, 1) for v in os.getloadavg()],
        "writing_a_reading_ms": round(1000 * float(np.median(writing)), 1),
        "kernel_MB": [before["kernel"], after["kernel"]],
        "heap_MB": [before["heap"], after["heap"]],
        "page_cpu_ms_a_redraw": round(1000 * (after["page"] - before["page"]) / max(1, summary["redraws"]), 1),
        "kernel_cpu_share": round((after["cpu"] - before["cpu"]) / took, 3),
        "delay_s": {"median": round(float(np.median(delays)), 2), "p95": round(float(np.percentile(delays, 95)), 2)},
        "page": summary,
        "errors": errors,
    }


class Through:
    """In the place of what writes readings at once: a trainer's recorder, which writes them by and by."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def write(self, kind: str, table: pa.Table, step: int) -> None:
        self._recorder.reading(kind, step, dict(zip(table.column_names, table.columns, strict=True)))


def _costs(book: Any, session: Any) -> dict[str, float]:
    """Megabytes: resident of the kernel, and of the page's JavaScript after a collection. Processor seconds of both."""
    session.send("HeapProfiler.collectGarbage")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    kernel = int(book.result("__import__('psutil').Process().memory_info().rss"))
    cpu = float(book.result("sum(__import__('psutil').Process().cpu_times()[:2])"))
    heap = round(metrics["JSHeapUsedSize"] / 1e6, 1)
    return {"kernel": round(kernel / 1e6, 1), "heap": heap, "cpu": cpu, "page": metrics["TaskDuration"]}


if __name__ == "__main__":
    main()
