"""What the Inspector tells of memory: the parts add up, old runs open, snapshots are asked for and opened."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from pretend_gpu import Training
from simulated import Simulation

from widgets.inspector import Inspector
from widgets.inspector.memory import COLOURS, LAYER_HOLDERS, ROWS, SHOWN, STAYING, WORDS, size_text
from widgets.inspector.recording import Recording
from workbench import Run, TrainConfig, train
from workbench.snapshots import convert, write_snapshot

JS = (Path(__file__).parents[2] / "widgets" / "inspector" / "memory.js").read_text()


def recorded(folder: Path, rank: int | None = None, **how: Any) -> Recording:
    Simulation(folder, **how).until(50)
    recording = Recording(Run(folder), rank)
    recording.take_events(recording.run.events, anew=True)
    while recording.read(last=True):
        pass
    return recording


def test_the_parts_are_those_of_the_fuller_moment_and_add_up(tmp_path: Path) -> None:
    recording = recorded(tmp_path / "run")
    holding = recording.holding
    assert holding.stack is not None and holding.moment == "forward"
    readings = recording.run.readings("memory").iloc[-1]
    last = {holder: values[-1] for holder, values in holding.curves()}
    assert sum(last.values()) == pytest.approx(readings["forward"], rel=1e-6)
    assert last["activations"] == pytest.approx(readings["activations"], rel=1e-6) and "gradients" not in last
    rows = holding.largest()
    assert len(rows) == SHOWN + 1 and rows[-1][0].endswith("other layers")
    layers = recording.run.readings("memory_layers")
    assert np.sum([held for _, held in rows]) == layers[list(LAYER_HOLDERS)].to_numpy().sum()


def test_of_several_ranks_the_chosen_one_is_told(tmp_path: Path) -> None:
    assert recorded(tmp_path / "all", ranks=2).holding.stack is None
    recording = recorded(tmp_path / "one", rank=1, ranks=2)
    assert recording.holding.stack is not None and len(recording.holding.stack) == 10


def test_runs_of_earlier_versions_open(tmp_path: Path) -> None:
    recording = recorded(tmp_path / "run", told=False)
    assert recording.holding.stack is None and len(recording.lines["memory:0:allocated"].arrays()[0]) == 10
    inspector = Inspector(Run(tmp_path / "run"), static=True)
    assert "GB" in inspector._static_html() and set(inspector.figures()) >= {"memory"}
    assert "memory_layers" not in inspector.figures()


def test_figures_draw_the_stack_and_the_layers(tmp_path: Path) -> None:
    Simulation(tmp_path / "run").until(50)
    run = Run(tmp_path / "run")
    inspector = Inspector(run, static=True)
    figures = inspector.figures()
    stacked = [trace for trace in figures["memory"].data if trace.stackgroup]
    assert {trace.name for trace in stacked} >= {"parameters", "optimizer state", "activations", "other"}
    assert sum(trace.y[-1] for trace in stacked) == pytest.approx(run.readings("memory")["forward"].iloc[-1], rel=1e-6)
    assert len(figures["memory_layers"].data) == len(LAYER_HOLDERS) and len(figures["memory_layers"].data[0].y) == SHOWN + 1
    html = inspector._static_html()
    assert "activations 17" in html and "What each layer holds" in html and len(html) < 60_000


def test_a_run_on_a_cpu_leaves_the_process_out(tmp_path: Path) -> None:
    config = TrainConfig(
        data={"name": "digits", "limit": 128, "batch_size": 32},
        model={"name": "mlp", "args": {"widths": [8]}},
        device="cpu",
        epochs=1,
        probes={"memory": {"every": 1}},
    )
    inspector = Inspector(train(config, root=tmp_path).run, static=True)
    inspector._static_html()
    assert inspector.recording is not None
    holding = inspector.recording.holding
    assert holding.process and "other" not in dict(holding.curves())
    assert "activations" in {holder for holder, _ in holding.curves()} or holding.moment == "backward"


def test_the_page_has_the_same_rows_words_and_colours() -> None:
    def constant(name: str) -> Any:
        text = next(line for line in JS.splitlines() if line.startswith(f"const {name} = ")).split(" = ", 1)[1].rstrip(";")
        for key in (*COLOURS, *ROWS, "forward", "backward"):
            text = text.replace(f" {key}:", f' "{key}":')
        return json.loads(text)

    assert tuple(constant("MEMORY_ROWS")) == ROWS and constant("MEMORY_ROWS")[:7] == list(STAYING)
    assert constant("MEMORY_COLOURS") == COLOURS and constant("MEMORY_WORDS") == WORDS
    assert tuple(constant("LAYER_HOLDERS")) == LAYER_HOLDERS
    assert [size_text(n) for n in (12, 1500, 2.5e6, 3.456e9)] == ["12 B", "1.5 kB", "2.5 MB", "3.46 GB"]


def test_snapshots_are_listed_and_opened_in_the_page(tmp_path: Path) -> None:
    simulated = Simulation(tmp_path / "run").until(10)
    training = Training()
    training.step(1)
    content = convert(training.gpu.snapshot(), known=training.known, marks=training.marks, facts={"step": 50, "rank": 0})
    run = Run(simulated.folder)
    write_snapshot(run.path / "snapshots", "step-50-rank-0", {}, content)
    inspector = Inspector(run)
    try:
        view = inspector._snapshots
        assert view.facts(run)["memory:snapshots"] == {"names": ["step-50-rank-0"], "can": True, "words": ""}
        inspector._on_request({"kind": "open_snapshot", "value": {"name": "step-50-rank-0", "theme": "dark"}})
        opened = view.facts(run)["memory:snapshot"]
        assert opened is not None and 'data-theme="dark"' in opened["html"]
        inspector._on_request({"kind": "open_snapshot", "value": {"name": "../../etc", "theme": "dark"}})
        assert view.facts(run)["memory:snapshot"] is None
        inspector._on_request({"kind": "snapshot", "value": None})
        assert "this run is on a CPU" in view.facts(run)["memory:snapshots"]["words"]
        simulated.finish()
        assert not view.facts(run)["memory:snapshots"]["can"]
    finally:
        inspector.close()
