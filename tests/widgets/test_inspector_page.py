"""What the Inspector's page can show beside the latest: other quantities, other steps, another run; and the page as a file."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from simulated import Simulation

from widgets.frames import Frame
from widgets.inspector import Inspector
from widgets.inspector.beside import differences, neighbours
from widgets.inspector.export import LIMIT, page
from widgets.inspector.histograms import edges, levels
from widgets.inspector.quantities import QUANTITIES, quantities_of
from widgets.inspector.recording import Recording
from workbench import TrainConfig, events
from workbench.errors import RunError
from workbench.run import Run

QUANTITY = {quantity.name: quantity for quantity in QUANTITIES}


def recorded(folder: Path) -> Recording:
    recording = Recording(Run.open(folder))
    recording.take_events(recording.run.events, anew=True)
    while recording.read(last=True):
        pass
    return recording


def operations(recording: Recording, name: str) -> list[dict[str, Any]]:
    frame = Frame()
    recording.write(frame)
    return [operation for operation in frame.operations if operation["name"] == name]


class TestQuantities:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 1000), st.floats(-30, -18), st.floats(0, 0.9))
    def test_underflow_is_what_a_cast_to_fp16_makes_zero(self, seed: int, about: float, zeros: float) -> None:
        random = np.random.default_rng(seed)
        values = np.exp2(about + 4 * random.standard_normal(5000)) * random.choice([-1, 1], 5000)
        values[random.random(5000) < zeros] = 0
        counts, _ = np.histogram(np.abs(values), bins=[0, *2.0 ** np.arange(-48, 17), np.inf])
        table = pa.table({"zeros": [float((values == 0).mean())], "histogram": pa.array([counts.astype(np.int32)])})
        lost = (values.astype(np.float16) == 0) & (values != 0)
        assert QUANTITY["underflow"].of(table)[0] == pytest.approx(lost.mean(), abs=1e-9)

    def test_only_those_whose_columns_are_there(self) -> None:
        plain = ["step", "layer", "norm", "max", "nonfinite", "weight_norm"]
        assert [q.name for q in quantities_of(plain)] == ["norm", "max"]
        assert [q.name for q in quantities_of([*plain, "update_ratio", "zeros", "histogram"])] == list(QUANTITY)

    def test_a_chosen_one_is_sent_whole_and_then_appended(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,), rich=True).until(50)
        recording = recorded(tmp_path / "run")
        assert not operations(recording, "gradients:zeros")
        recording.choose_quantity("zeros")
        assert [(o["at"], o["n"]) for o in operations(recording, "gradients:zeros")] == [(0, 10)]
        assert recording.others["zeros"].values == pytest.approx(0.1)
        simulation.until(60)
        while recording.read(last=True):
            pass
        assert [(o["at"], o["n"]) for o in operations(recording, "gradients:zeros")] == [(10, 2)]
        assert {q["name"] for q in recording.facts()["quantities"]} == set(QUANTITY)


class TestDistributions:
    @pytest.mark.parametrize(("bins", "smallest"), [(131, -16), (163, -24)])
    def test_edges_follow_from_the_number_of_bins(self, bins: int, smallest: int) -> None:
        known = np.array(edges(bins))
        assert len(known) == bins + 1 and np.all(known == -known[::-1])
        sizes = np.log2(known[known > 0])
        assert sizes[0] == smallest and sizes[-2] == 16 and np.allclose(np.diff(sizes), 0.5)

    @given(st.lists(st.integers(0, 10**6), min_size=3, max_size=40))
    def test_a_byte_a_bin_keeps_the_counts(self, counts: list[int]) -> None:
        row = np.array([counts], dtype="f8")
        again = (levels(row) / 255.0) ** 2 * max(1, row.max())
        assert np.abs(again - row).max() <= 0.005 * max(1, row.max())

    def test_an_earlier_step_comes_with_its_statistics(self, tmp_path: Path) -> None:
        Simulation(tmp_path / "run", blocks=(1,), ranks=2, rich=True).until(50)
        recording = recorded(tmp_path / "run")
        (latest,) = operations(recording, "activations")
        recording.choose_step(27)
        (earlier,) = operations(recording, "activations")
        assert (latest["step"], earlier["step"]) == (50, 25) and earlier["stats"] == latest["stats"] > 0
        table = Run.open(tmp_path / "run").readings("activations")
        own = table[(table["step"] == 25) & (table["layer"] == "conv1")]
        mean, std, zeros, dead, saturated = recording.stats[25.0][0]
        assert mean == pytest.approx(own["mean"].mean()) and zeros == pytest.approx(own["zeros"].mean())
        assert std == pytest.approx(np.sqrt((own["std"] ** 2 + own["mean"] ** 2).mean() - own["mean"].mean() ** 2))
        assert (dead, saturated) == (0, pytest.approx(0.02))
        assert recording.facts()["sampling"] == {"error": 0.008, "overhead": 0.012}

    def test_what_readings_take_is_told_as_the_run_measures_it(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,)).until(20)
        assert recorded(tmp_path / "run").facts()["sampling"] == {}
        simulation.emit(events.ReadingsTimed(step=20, cost=0.17, counted=9, every=18, overhead=0.17 / 18.17))
        simulation.until(40)
        assert recorded(tmp_path / "run").facts()["sampling"] == {"overhead": 0.00936}


class TestBeside:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        for name, rate in (("one", 0.1), ("two", 0.02)):
            Simulation(tmp_path / name, blocks=(1,)).until(40).finish()
            config = TrainConfig(optim={"lr": rate}, label=name)  # type: ignore[arg-type]
            (tmp_path / name / "config.yaml").write_text(f"kind: {config.kind}\n{config.to_yaml()}")
        return tmp_path / "one", tmp_path / "two"

    def test_settings_that_differ(self, pair: tuple[Path, Path]) -> None:
        one, two = map(Run.open, pair)
        assert differences(one, two) == [("label", "one", "two"), ("optim.lr", "0.1", "0.02")]
        assert neighbours(one) == ["two"]

    def test_both_are_followed_and_only_neighbours_are_offered(
        self, pair: tuple[Path, Path], until: Callable[..., Any], live: None
    ) -> None:
        inspector = Inspector(pair[0], beside=pair[1])
        until(lambda: not inspector.following)
        frame = Frame()
        inspector._changes(frame, whole=True)
        of = {run: {o["name"] for o in frame.operations if o.get("run") == run} for run in (None, "beside")}
        assert {"loss", "gradients", "header", "differences"} <= of[None] and {"loss", "gradients", "layers"} <= of["beside"]

        def ask(value: Any) -> None:
            inspector._on_page(inspector, {"kind": "beside", "value": value}, [])

        ask(None)
        assert inspector._other is None
        for outside in ("../two", str(pair[1]), "one", 3):
            ask(outside)
            assert inspector._other is None, "the page may choose among the runs of the folder only"
        ask("two")
        assert inspector._other is not None and inspector._other.run.id == "two"
        inspector.close()

    def test_there_must_be_a_run(self) -> None:
        with pytest.raises(RunError, match="No run is open"):
            Inspector().beside(Run(Path("any")))


def unpacked(content: bytes) -> list[dict[str, Any]]:
    (data,) = re.findall(rb'id="data">([^<]*)<', content)
    return list(json.loads(gzip.decompress(base64.b64decode(data)).partition(b"\0")[0]))


class TestExport:
    def test_a_file_holds_the_whole_history(self, tmp_path: Path) -> None:
        Simulation(tmp_path / "run", blocks=(1, 1), rich=True).until(200).finish()
        path = Inspector(tmp_path / "run").export(tmp_path / "deep" / "run.html")
        content = path.read_bytes()
        assert len(content) < LIMIT
        told = {operation["name"]: operation for operation in unpacked(content)}
        assert {
            "loss",
            "rate",
            "memory:0:peak",
            "memory:parts",
            "header",
            "findings",
            *(f"gradients:{n}" for n in QUANTITY if n != "norm"),
        } <= set(told)
        assert told["loss"]["n"] == 200 and told["gradients"]["n"] == told["activations"]["n"] == 40
        assert told["activations"]["op"] == "history"

    def test_names_are_text_and_the_policy_forbids_requests(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "<b>run", blocks=(1,))
        simulation.parameters[0] = "</script><script>alert(1)</script>"
        simulation.until(20)
        text = Inspector(simulation.folder).export(tmp_path / "run.html").read_text()
        assert "<title>&lt;b&gt;run" in text and "alert(1)" not in text
        assert "default-src 'none'" in text and not re.search(r"""(src|href)=["']?http""", text)

    def test_what_does_not_fit_loses_columns(self, tmp_path: Path) -> None:
        Simulation(tmp_path / "run", blocks=(2, 1)).until(200)
        recordings = {"": recorded(tmp_path / "run")}
        whole = page("run", recordings, {})
        less = page("run", recordings, {}, limit=len(whole) - 1)
        assert len(less) < len(whole)
        columns = {o["name"]: o["n"] for o in unpacked(less) if o["op"] in ("columns", "history")}
        assert columns == {"gradients": 20, "gradients:max": 20, "memory:parts": 20, "activations": 20}
        assert next(o for o in unpacked(less) if o["name"] == "loss")["n"] == 200

    def test_a_live_page_does_not_notice(self, tmp_path: Path) -> None:
        simulation = Simulation(tmp_path / "run", blocks=(1,)).until(40)
        one, two = recorded(tmp_path / "run"), recorded(tmp_path / "run")
        frames = []
        for recording in (one, two):
            recording.write(Frame())
        simulation.until(60)
        for recording in (one, two):
            while recording.read(last=True):
                pass
            if recording is two:
                page("run", {"": recording}, {})
            frames.append(Frame())
            recording.write(frames[-1])
        assert frames[0].operations == frames[1].operations and frames[0].buffer == frames[1].buffer

    def test_there_must_be_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="No run is open to export"):
            Inspector().export(tmp_path / "run.html")
