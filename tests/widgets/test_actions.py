"""What panels do for real: the code they show, run alone, gives the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from widgets import ComparePanel, PrunePanel, QuantizePanel, TrainPanel, Workbench
from workbench.artefact import read_structure
from workbench.compress.pruning_config import PruneConfig
from workbench.compress.quantization_config import QuantConfig
from workbench.run import Run
from workbench.training.config import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("live")]
CONFIG = TrainConfig(model={"name": "mlp"}, epochs=2, device="cpu")


def run_alone(code: str, runs: Path) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"WORKBENCH_RUNS": str(runs)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, trained once."""
    runs = tmp_path_factory.mktemp("trained")
    run_alone(f"from workbench import TrainConfig, train\ntrain({CONFIG.to_code()})", runs)
    return Run.all(runs)[0].path


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("WORKBENCH_RUNS", str(trained.parent))
    return Run(trained)


def test_the_code_of_start_repeats_the_run(tmp_path: Path, until: Any) -> None:
    panel = TrainPanel(CONFIG)
    code = panel.code
    panel.start()
    until(lambda: panel.run is not None and panel.run.status == "finished", timeout=90)
    assert panel.run is not None
    run_alone(code + "run.wait()", tmp_path / "again")
    again = Run.all(tmp_path / "again")[0]
    assert list(again.history["loss"]) == list(panel.run.history["loss"])
    assert (panel.run.path / "repro.py").exists()
    panel.close()


def test_prune_keeps_its_code_and_result_beside_the_model(run: Run, until: Any) -> None:
    panel = PrunePanel(run, PruneConfig(ratio=0.2, criterion="taylor"))
    _ = panel.view
    code = panel.code
    panel._button.act("act")
    until(lambda: "finished" in panel._results.html or "failed" in panel._results.html, timeout=120)
    assert "failed" not in panel._results.html, panel._results.html
    made = panel.jobs[0]
    assert made.code == code
    original, pruned = made.result["rows"]
    assert pruned["parameters"] < 0.85 * original["parameters"]
    assert (made.folder / "comparison.html").exists()
    panel.close()

    found = PrunePanel(run)  # as after a restart of the kernel
    _ = found.view
    assert made.folder.name in found._results.html
    assert "prune-2" in found.code
    found.close()
    accuracy = pruned["accuracy"]
    run_alone(code + f"assert abs(comparison.frame()['accuracy'][1] - {accuracy!r}) < 1e-9", run.path.parent)


def test_an_impossible_action_is_one_message(run: Run, until: Any) -> None:
    panel = PrunePanel(run)
    panel.form.type("ignored", "no_such_layer")
    panel._button.act("act")
    until(lambda: "failed" in panel._results.html, timeout=120)
    assert "no_such_layer" in panel._results.html
    panel.close()


def test_compare_measures_what_is_ticked(run: Run, until: Any) -> None:
    panel = ComparePanel(run, chosen=[])
    panel.form.type("compile", False)
    panel.form.type("seconds", "1")
    assert panel.chosen == {}
    panel._button.act("act")
    until(lambda: "finished" in panel._results.html or "failed" in panel._results.html, timeout=120)
    assert "original" in panel._results.html, panel._results.html
    assert "<svg" in panel._results.html and "peak memory" in panel._results.html
    assert (panel.jobs[0].folder / "comparison.csv").read_text().startswith("variant,form,")
    sent: list[Any] = []
    panel._results.send = lambda content, buffers=None: sent.append(content)  # type: ignore[method-assign]
    panel._results.act("report", panel.jobs[0].folder.name)
    until(lambda: sent)
    assert "<html" in sent[0]["page"]
    panel._results.act("report", "../config.yaml")
    assert len(sent) == 1
    panel.close()


def test_the_workbench_shares_its_run(run: Run, until: Any) -> None:
    bench = Workbench(run=run)
    _ = bench.view
    for tab in ("Inspect", "Explain", "Prune", "Quantize", "Compare", "Runs", "Train"):
        panel = bench.open(tab)
        assert tab == "Runs" or panel.run.path == run.path
        assert f'data-value="{tab}" role="tab" aria-selected="true"' in bench._nav.html
    assert isinstance(bench.panels["Quantize"], QuantizePanel)
    bench.open("Runs")._surface.act("open", run.id)
    until(lambda: bench.tab == "Train")
    assert bench.train.config == run.config
    bench.close()


def test_fine_tuning_fills_in_the_training_form(run: Run, until: Any) -> None:
    bench = Workbench(run=run)
    _ = bench.view
    bench.open("Prune")
    bench._tune(run.path / "variants" / "prune-1")
    until(lambda: bench.tab == "Train")
    assert bench.train.config.model.name.endswith("prune-1")
    bench.close()


@pytest.mark.parametrize("mode", ["dynamic", "qat"])
def test_quantize_makes_the_model_that_the_form_describes(run: Run, until: Any, mode: str) -> None:
    panel = QuantizePanel(run, QuantConfig(mode=mode))
    _ = panel.view
    before = len(panel.jobs)
    panel._button.act("act")
    until(lambda: len(panel.jobs) > before and {job.status for job in panel.jobs} <= {"finished", "failed"}, timeout=150)
    assert all(job.status == "finished" for job in panel.jobs), [job.problem() for job in panel.jobs]
    made = {read_structure(job.folder)["transforms"][-1]["config"]["mode"]: job.folder for job in panel.jobs}
    assert (made[mode] / "comparison.html").is_file()
    panel.close()
