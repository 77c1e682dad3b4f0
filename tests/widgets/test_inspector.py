"""The Inspector without a page: frames that a page can replay, recordings, what is static, when threads end; the diagnosis."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from simulated import BINS, SAMPLE, Simulation

from widgets.frames import Columns, Frame, Line
from widgets.inspector import Inspector
from widgets.inspector.histograms import edges, shown_bins
from widgets.inspector.ranks import Join
from widgets.inspector.recording import Recording
from widgets.live_plot import LivePlot, is_static
from workbench import diagnosis, events
from workbench.errors import ConfigError, RunError
from workbench.run import Run


class Page:
    """What ``plotting.js`` does with frames."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[float, float]]] = {}
        self.grids: dict[str, tuple[list[float], list[np.ndarray]]] = {}
        self.facts: dict[str, Any] = {}

    def receive(self, frame: Frame) -> int:
        values = np.frombuffer(frame.buffer, dtype="<f4")
        for o in frame.operations:
            name = o["name"]
            if o["op"] == "line":
                kept, n = self.lines.get(name, [])[: o["at"]], o["n"]
                assert len(kept) == o["at"], "a splice beyond what the page holds"
                self.lines[name] = [*kept, *zip(values[:n].tolist(), values[n : 2 * n].tolist(), strict=True)]
                values = values[2 * n :]
            elif o["op"] == "columns":
                x, columns = self.grids.get(name, ([], []))
                assert len(x) >= o["at"], "a splice beyond what the page holds"
                n, rows = o["n"], o["rows"]
                block = values[n : n + n * rows].reshape(n, rows)
                self.grids[name] = ([*x[: o["at"]], *values[:n].tolist()], [*columns[: o["at"]], *block])
                values = values[n * (1 + rows) :]
            elif o["op"] == "halve":
                x, columns = self.grids[name]
                merge = np.add if o["how"] == "sum" else np.fmax
                merged = [merge(columns[2 * i], columns[2 * i + 1]) for i in range(o["keep"])]
                self.grids[name] = ([x[2 * i] for i in range(o["keep"])], merged)
            elif o["op"] == "fact":
                self.facts[name] = o["value"]
            elif o["op"] == "levels":
                values = values[o["stats"] + -(-o["rows"] * o["bins"] // 4) :]
        assert not len(values), "values left over"
        return len(frame.buffer)


chunks = st.lists(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), max_size=40), max_size=12)


class TestFrames:
    @settings(max_examples=150, deadline=None)
    @given(chunks, st.integers(8, 40))
    def test_a_line_is_bounded_keeps_extremes_and_replays(self, parts: list[list[float]], limit: int) -> None:
        line, page, at, everything = Line(limit), Page(), 0, []
        for part in parts:
            line.extend(range(at, at + len(part)), part)
            at, everything = at + len(part), everything + part
            frame = Frame()
            line.write(frame, "line")
            page.receive(frame)
            assert len(line) <= limit
            x, y = line.arrays()
            assert np.array_equal(
                np.array(page.lines["line"], dtype="f4").reshape(-1, 2), np.column_stack([x, y]).astype("f4"), True
            )
        finite = [v for v in everything if np.isfinite(v)]
        if finite:
            x, y = line.arrays()
            assert np.nanmin(y) == min(finite) and np.nanmax(y) == max(finite)
            assert x[0] == 0 and np.all(np.diff(x) > 0)
        if everything and np.isfinite(everything[-1]):
            assert line.arrays()[0][-1] == len(everything) - 1

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(1, 30), max_size=10), st.integers(2, 20), st.sampled_from(["max", "sum"]))
    def test_columns_are_bounded_merge_exactly_and_replay(self, parts: list[int], limit: int, merge: Any) -> None:
        random = np.random.default_rng(0)
        columns, page, added = Columns(3, limit, merge), Page(), []
        for count in parts:
            for _ in range(count):
                added.append(random.integers(0, 100, 3).astype("f4"))
                columns.append(len(added), added[-1])
            frame = Frame()
            columns.write(frame, "grid")
            page.receive(frame)
            assert len(columns) <= limit
            x, held = page.grids["grid"]
            assert np.array_equal(x, columns.x) and np.array_equal(np.array(held), columns.values)
            whole = np.array(added)
            expected = whole.sum(axis=0) if merge == "sum" else whole.max(axis=0)
            shown = columns.values.sum(axis=0) if merge == "sum" else columns.values.max(axis=0)
            assert np.array_equal(shown, expected), "merged must equal the whole"
            assert columns.x[0] == 1 and columns.x[-1] > len(added) - columns.stride

    def test_an_append_costs_what_was_appended(self) -> None:
        line, grid = Line(), Columns(161, 500)
        sizes = []
        for step in range(3000):
            line.extend([step], [float(step)])
            grid.append(step, np.ones(161))
            frame = Frame()
            line.write(frame, "line")
            grid.write(frame, "grid")
            sizes.append(len(frame.buffer))
        assert np.median(sizes) < 800 and max(sizes) < 10_000  # a halved curve is sent anew, a halved heat map is not

    def test_a_part_grows_on_its_own(self) -> None:
        columns = Columns(4, 6, "sum")
        for step in range(9):
            columns.append(step, np.arange(4.0))
        part = columns.part(slice(2, 4))
        part.append(9, np.array([10.0, 10.0]))
        columns.append(9, np.array([0, 0, 10.0, 10.0]))
        assert np.array_equal(part.values, columns.values[:, 2:4]) and np.array_equal(part.x, columns.x)


def test_join_waits_for_every_rank_and_passes_each_step_once() -> None:
    join = Join(sum)
    for rank, step in [(0, 1), (1, 1), (0, 2), (0, 3), (1, 3)]:
        join.put(step, rank, 10**rank)
    assert list(join.take()) == [(1, 11), (2, 1), (3, 11)]
    join.put(2, 1, 99)  # too late
    join.put(4, 0, 1)
    assert list(join.take()) == []
    assert list(join.take(everything=True)) == [(4, 1)]


def test_bin_edges_are_those_of_the_probes() -> None:
    from workbench.probes import EDGES

    known = edges(len(EDGES) - 1)
    assert len(EDGES) - 1 == BINS and known[1:-1] == pytest.approx(list(EDGES[1:-1]))
    assert np.all(np.diff(known) > 0)


@given(st.lists(st.integers(0, 1000), min_size=BINS, max_size=BINS))
def test_shown_bins_leave_out_little(counts: list[int]) -> None:
    row = np.array([counts], dtype="f8")
    low, inner, outer, high = shown_bins(row)
    assert 0 <= low < inner < outer < high <= BINS and inner + outer == BINS
    apart = row.sum() - row[0, BINS // 2]
    assert row[0, inner:outer].sum() - row[0, BINS // 2] <= 0.05 * apart + 1e-9
    assert row[0, low:high].sum() >= (1 - 0.002 * BINS) * row.sum()


def recorded(folder: Path, **how: Any) -> Recording:
    recording = Recording(Run.open(folder), **how)
    recording.take_events(recording.run.events, anew=True)
    while recording.read(last=True):
        pass
    return recording


def caught_up(recording: Recording, page: Page) -> int:
    frame = Frame()
    recording.write(frame)
    return page.receive(frame)


class TestRecording:
    def test_followed_live_equals_read_at_the_end(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", ranks=2, blocks=(1, 1))
        run = Run.open(tmp_path / "run")
        live, page, seen = Recording(run), Page(), 0
        for target in (5, 40, 45, 300, 305):
            simulation.until(target)
            fresh = run.events[seen:]
            seen += len(fresh)
            live.take_events(fresh, anew=False)
            while live.read():
                pass
            caught_up(live, page)
        later, whole = Page(), Page()
        caught_up(recorded(tmp_path / "run"), later)
        frame = Frame()
        live.write(frame, whole=True)
        whole.receive(frame)
        for other in (later, whole):
            assert page.lines == other.lines
            assert page.facts == other.facts
            for name, (x, columns) in page.grids.items():
                assert x == other.grids[name][0] and np.array_equal(columns, other.grids[name][1])
        assert len(page.lines["loss"]) == 305 and {"metric:accuracy", "memory:1:peak"} <= set(page.lines)

    def test_ranks_merge_to_the_whole(self, tmp_path: Path) -> None:
        Simulation(tmp_path / "run", ranks=2, blocks=(1,)).until(50)
        one, two, both = (recorded(tmp_path / "run", rank=rank) for rank in (0, 1, None))
        assert one.gradients and two.gradients and both.gradients and one.activations and two.activations and both.activations
        assert np.array_equal(both.gradients.values, np.maximum(one.gradients.values, two.gradients.values))
        assert np.array_equal(both.activations.values, one.activations.values + two.activations.values)

    def test_a_restart_takes_back_what_it_undid(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,)).until(100)
        run = Run.open(tmp_path / "run")
        live, page = Recording(run), Page()
        live.take_events(run.events, anew=False)
        while live.read():
            pass
        caught_up(live, page)
        simulation.start(at=60)
        simulation.until(80)
        live.take_events(run.events, anew=True)
        while live.read():
            pass
        frame = Frame()
        live.write(frame, whole=True)
        again = Page()
        again.receive(frame)
        assert [x for x, _ in again.lines["loss"]] == list(range(1, 81))
        assert again.grids["gradients"][0] == list(range(5, 81, 5))

    def test_a_layer_seen_late_gets_its_row(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,)).until(20)
        simulation.parameters = [*simulation.parameters, "head.weight"]
        simulation.until(40)
        recording = recorded(tmp_path / "run")
        assert recording.gradients is not None and recording.layers("gradients")[-1] == "head.weight"
        assert np.isnan(recording.gradients.values[0, -1]) and recording.gradients.values[-1, -1] > 0

    def test_a_chosen_layer_shows_its_module(self, tmp_path: Path) -> None:
        Simulation(tmp_path / "run", blocks=(1,)).until(50)
        recording, page = recorded(tmp_path / "run"), Page()
        recording.choose_layer("layer1.0.conv1.weight")
        caught_up(recording, page)
        assert page.facts["choice"]["module"] == "layer1.0.conv1"
        x, columns = page.grids["layer"]
        assert x == list(range(5, 51, 5)) and all(column.sum() == SAMPLE for column in columns)


class TestInspector:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        simulation = Simulation(tmp_path / "20261121-resnet", blocks=(2, 2))
        simulation.until(400).finish()
        return simulation.folder

    def test_a_file_gets_a_small_drawing_and_no_widget(self, folder: Path) -> None:
        assert is_static(), "there is no page under pytest"
        inspector = Inspector(folder)
        bundle, _ = inspector._repr_mimebundle_()
        assert inspector.comm is None and set(bundle) == {"text/plain", "text/html"}
        html = bundle["text/html"]
        assert len(html) < 60_000 and "<script" not in html
        for words in ("20261121-resnet", "finished", "Loss", "Gradient norms", "Activations", "Memory", "held-out loss"):
            assert words in html
        assert not inspector.following

    def test_names_are_escaped(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,))
        simulation.parameters[0] = "<img src=x>.weight"
        simulation.until(20)
        html = Inspector(tmp_path / "run")._static_html()
        assert "<img" not in html and "&lt;img" in html

    def test_environment_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORKBENCH_STATIC", "0")
        assert not is_static()
        monkeypatch.setenv("WORKBENCH_STATIC", "1")
        assert is_static()

    def test_figures_for_code(self, folder: Path) -> None:
        figures = Inspector(folder).figures()
        assert set(figures) == {
            *("loss", "gradients", "gradients:max", "activations", "memory", "memory_layers", "throughput", "communication"),
        }
        assert len(figures["gradients"].data[0].y) == 29 and len(figures["gradients"].data[0].x) == 80

    def test_nothing_recorded_yet(self, tmp_path: Path) -> None:
        Simulation(tmp_path / "run")
        assert "nothing recorded" in Inspector(tmp_path / "run")._static_html()
        assert "inspector.open" in Inspector()._static_html()

    def test_a_missing_run_says_so(self) -> None:
        with pytest.raises(RunError, match="There is no run"):
            Inspector("no-such-run")

    def test_it_follows_until_the_end_and_then_rests(self, tmp_path: Path, until: Callable[..., Any], live: None) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,)).until(20)
        inspector = Inspector(tmp_path / "run")
        until(lambda: inspector.recording and inspector.recording.gradients and len(inspector.recording.gradients) == 4)
        simulation.until(40)
        until(lambda: len(inspector.recording.gradients) == 8)
        assert inspector.following
        simulation.finish()
        until(lambda: not inspector.following)
        assert inspector.stats.summary()["frame_bytes_median"] < 60_000
        inspector.close()
        assert "finished" in inspector._repr_mimebundle_()[0]["text/html"]  # a closed view still shows the run

    def test_closing_and_turning_to_another_run_end_the_thread(
        self, tmp_path: Path, until: Callable[..., Any], live: None
    ) -> None:
        for name in ("one", "two"):
            Simulation(tmp_path / name, blocks=(1,)).until(20)
        inspector = Inspector(tmp_path / "one")
        assert inspector._followers is not None
        (first,) = inspector._followers.values()
        inspector.open(tmp_path / "two")
        until(lambda: not first.alive)
        assert inspector.run is not None and inspector.run.id == "two" and inspector.following
        inspector.close()
        until(lambda: not [t for t in threading.enumerate() if t.name.startswith("follow-")])

    def test_requests_of_the_page(self, tmp_path: Path, until: Callable[..., Any], live: None) -> None:
        Simulation(tmp_path / "run", ranks=2, blocks=(1,)).until(100)
        inspector = Inspector(tmp_path / "run")
        until(lambda: inspector.recording and inspector.recording.activations)

        def ask(kind: str, value: Any) -> None:
            inspector._on_page(inspector, {"kind": kind, "value": value}, [])

        assert inspector.recording is not None
        ask("layer", "conv1.weight")
        ask("time", 24)
        assert inspector.recording.layer == "conv1.weight" and inspector.recording.distributions().step == 20
        ask("layer", "not a layer")
        ask("time", None)
        assert inspector.recording.layer is None and inspector.recording.distributions().step == 100
        ask("rank", 1)
        assert inspector.recording.rank == 1 and len(inspector.recording.gradients or []) == 20
        ask("nonsense", {"a": 1})
        inspector.close()


class TestLivePlot:
    def test_appends_are_bounded_and_throttled(self, live: None) -> None:
        plot = LivePlot({"loss": {"smooth": 0.8}, "accuracy": {"axis": 2}})
        for step in range(5000):
            plot.append("loss", step, 1 / (1 + step))
        plot.redraw()
        x, _ = plot.arrays("loss")
        assert len(x) <= 1000 and x[0] == 0 and x[-1] == 4999
        assert plot.stats.frames <= 4
        plot.clear()
        assert not len(plot.arrays("loss")[0])
        plot.close()

    def test_errors_name_the_nearest(self) -> None:
        plot = LivePlot({"loss": {}})
        with pytest.raises(ConfigError, match="Did you mean 'loss'"):
            plot.append("los", 1, 2)
        with pytest.raises(ConfigError, match="Did you mean 'smooth'"):
            LivePlot({"loss": {"smoth": 0.5}})
        with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
            LivePlot({"loss": {"smooth": 1}})


class TestDiagnosis:
    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            (None, set()),
            ("vanishing", {"vanishing_gradients"}),
            ("exploding", {"exploding_gradients", "diverging_loss"}),
            ("dead", {"dead_activations"}),
            ("nan", {"non_finite_loss", "non_finite_gradients"}),
        ],
    )
    def test_each_planted_fault_is_found_and_no_other(self, tmp_path: Path, fault: str | None, expected: set[str]) -> None:
        Simulation(tmp_path / "run", fault=fault, blocks=(2, 2, 2)).until(600)
        run = Run.open(tmp_path / "run")
        findings = diagnosis.diagnose(run.history, run.readings("gradients"), run.readings("activations"))
        assert {f.name for f in findings} == expected
        assert {f.name for f in Inspector(run).findings} == expected, "the Inspector keeps the first and last readings only"
        for finding in findings:
            assert finding.message.endswith(".") and finding.remedy

    def test_remedies_are_settings(self, tmp_path: Path) -> None:
        from workbench.training.config import TrainConfig

        for fault in ("vanishing", "exploding", "dead", "nan"):
            Simulation(tmp_path / fault, fault=fault, blocks=(1, 1)).until(500)
            for finding in Inspector(tmp_path / fault).findings:
                TrainConfig().override(finding.remedy)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1000), st.floats(0.02, 0.4), st.floats(0.2, 5), st.integers(10, 1500))
    def test_a_loss_that_falls_is_healthy(self, seed: int, noise: float, start: float, steps: int) -> None:
        random, step = np.random.default_rng(seed), np.arange(1, steps + 1)
        floor = 0.02 * start
        loss = (floor + (start - floor) * np.exp(-step / (0.15 * steps))) * np.exp(noise * random.standard_normal(steps))
        assert not diagnosis.diagnose(pd.DataFrame({"step": step, "loss": loss, "lr": 0.1}))

    def test_a_loss_that_does_not_move_is_a_plateau(self) -> None:
        step = np.arange(1, 401)
        loss = 2.30 + 0.05 * np.random.default_rng(0).standard_normal(400)
        assert [f.name for f in diagnosis.diagnose(pd.DataFrame({"step": step, "loss": loss, "lr": 1e-6}))] == ["plateau"]

    @pytest.mark.parametrize(
        ("outputs", "expected"),
        [
            (np.tanh(20 * np.random.default_rng(0).standard_normal(4000)), {"saturated_activations"}),
            (1 / (1 + np.exp(-60 * np.random.default_rng(0).standard_normal(4000))), {"saturated_activations"}),
            (np.tanh(np.random.default_rng(0).standard_normal(4000)), set()),
            (1 / (1 + np.exp(-np.random.default_rng(0).standard_normal(4000))), set()),
            (np.maximum(np.random.default_rng(0).standard_normal(4000), 0), set()),
            (np.zeros(4000), {"dead_activations"}),
            (5e4 * np.random.default_rng(0).standard_normal(4000), {"overflowing_activations"}),
        ],
    )
    def test_activations(self, outputs: np.ndarray, expected: set[str]) -> None:
        row = {"layer": "act", "count": outputs.size, "mean": outputs.mean(), "std": outputs.std(), "min": outputs.min()}
        row |= {"max": outputs.max(), "zeros": (outputs == 0).mean(), "nonfinite": 0, "rank": 0}
        table = pd.DataFrame([{"step": step, **row} for step in (1, 2, 3)])
        assert {f.name for f in diagnosis.diagnose(activations=table)} == expected

    def test_one_skipped_step_of_loss_scaling_is_no_fault(self) -> None:
        rows = [
            {
                "step": step,
                "rank": 0,
                "layer": f"l{i}.weight",
                "norm": np.inf if step == 3 else 1.0,
                "max": 1.0,
                "weight_norm": 2.0,
            }
            for step in range(1, 7)
            for i in range(4)
        ]
        table = pd.DataFrame(rows)
        table["nonfinite"] = (table["step"] == 3).astype(int)
        assert not diagnosis.diagnose(gradients=table)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, None),
            (
                {"busy": [0.02, 0.03]},
                ("slow_rank", "Rank 1 takes 30 ms over its part of a step, the others 20 ms: they wait 37 %"),
            ),
            ({"busy": [0.02, 0.03], "waited": [0.0, 0.012]}, ("slow_rank", "mostly waiting for samples")),
            (
                {"step": 0.05},
                ("exposed_communication", "All ranks wait for 440 MB of gradients for 20 ms of each step, 40 % of it"),
            ),
            ({"step": 0.05, "network": 1.0}, ("slow_network", "A network of 1 Gb/s links the hosts")),
            ({"step": 0.032, "network": 1.0}, ("slow_network", "2 ms or 6")),
            ({"step": 0.032, "network": 25.0}, None),
            ({"waited": [0.01, 0.012]}, ("starved_step", "Steps wait for samples 3")),
        ],
    )
    def test_where_a_step_loses_its_time(self, changes: dict[str, Any], expected: tuple[str, str] | None) -> None:
        """Two ranks that compute for 30 ms, or as told, in steps of 31.5 ms."""
        busy, waited = changes.get("busy", [0.029, 0.030]), changes.get("waited", [0.0, 0.0])
        rows = [
            {"step": step, "rank": rank, "busy": busy[rank], "waited": waited[rank], "payload": 440_000_000}
            | {"exposed": changes.get("step", 0.0315) - busy[rank], "network": changes.get("network", math.nan)}
            for step in range(1, 9)
            for rank in (0, 1)
        ]
        rows[0] |= {"busy": math.nan, "exposed": math.nan}  # as of a first step
        found = diagnosis.diagnose(communication=pd.DataFrame(rows))
        assert [f.name for f in found] == ([] if expected is None else [expected[0]])
        assert expected is None or expected[1] in found[0].message

    def test_a_slow_rank_shows_in_a_run(self, tmp_path: Path) -> None:
        from workbench.training.config import TrainConfig

        Simulation(tmp_path / "run", ranks=3, fault="slow", blocks=(1,)).until(100)
        (finding,) = Inspector(tmp_path / "run").findings
        assert finding.name == "slow_rank" and "Rank 2" in finding.message
        assert TrainConfig().override(finding.remedy).balance.shares == "speed"
        html = Inspector(tmp_path / "run")._static_html()
        assert "own work in a step" in html and "rank 2, ms" in html

    def test_tables_may_be_empty(self) -> None:
        assert diagnosis.diagnose() == []
        empty = pd.DataFrame({"step": pd.Series(dtype="int64"), "rank": pd.Series(dtype="int64")})
        assert diagnosis.diagnose(empty, empty, empty) == []


@pytest.mark.usefixtures("forked")
def test_the_apply_button_runs_the_code_that_it_shows(tmp_path: Path, until: Callable[..., Any], live: None) -> None:
    """A real run, of which a finding says to clip: the page asks, the job takes it between two steps, the page hears of it."""
    from workbench import TrainConfig, launch

    data = {"name": "digits", "batch_size": 32}
    run = launch(TrainConfig(data=data, model={"name": "mlp"}, epochs=1000, device="cpu"), root=tmp_path)
    until(lambda: run.progress.step > 5, 60)
    inspector = Inspector(run)
    finding = events.Finding(
        name="jumpy",
        severity="warning",
        message="It jumps.",
        remedy={"optim.lr": 1e-4},
        alternatives=({"clip.mode": "fixed", "clip.max_norm": 0.5},),
    )
    inspector._findings.rows, inspector._findings._next = [finding], math.inf  # no look of its own in between
    page = Page()

    def shown() -> list[dict[str, Any]]:
        frame = Frame()
        with inspector._lock:
            inspector._changes(frame, whole=True)
        page.receive(frame)
        remedies: list[dict[str, Any]] = next(row["remedies"] for row in page.facts["findings"] if row["name"] == "jumpy")
        return remedies

    first, second = shown()
    assert "print(apply(Run.open(" in second["code"] and "'clip.max_norm': 0.5" in second["code"]
    assert [first["text"], second["text"]] == ["optim.lr=0.0001", "clip.mode=fixed clip.max_norm=0.5"]
    inspector._on_page(inspector, {"kind": "apply", "value": second["key"]}, [])
    inspector._on_page(inspector, {"kind": "apply", "value": second["key"]}, [])  # a second click changes nothing
    inspector._on_page(inspector, {"kind": "apply", "value": "jumpy:2"}, [])
    inspector._on_page(inspector, {"kind": "apply", "value": "no such finding"}, [])
    until(lambda: "in the running" in shown()[1]["applied"], 30)
    assert not shown()[0]["applied"]
    applied = until(lambda: [e for e in run.events if isinstance(e, events.CommandApplied)], 30)
    assert [e.settings for e in applied] == [{"clip_mode": "fixed", "clip_max_norm": 0.5}]
    assert run.status == "running"
    inspector.close()
    run.kill()


def test_a_finding_of_the_run_is_shown(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path / "run", blocks=(1,)).until(50)
    remedy = {"data.workers": 4}
    simulation.emit(events.Finding(name="slow_data", severity="info", message="Data is slow.", step=50, remedy=remedy))
    assert [f.name for f in Inspector(tmp_path / "run").findings] == ["slow_data"]
