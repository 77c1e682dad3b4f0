"""The notebooks themselves: stored without outputs, with parameters, and small once they have run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import papermill
import pytest

from workbench.pipeline import PipelineConfig
from workbench.run import Run
from workbench.stage import MAX_BYTES, check

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs_and_says_what_it_is(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
    assert book.cells[0].cell_type == "markdown"
    assert book.cells[0].source.startswith("# ")
    assert book.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_takes_the_usual_parameters(path: Path) -> None:
    check(path, {"config": None, "overrides": []})


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_pipeline_names_notebooks_and_parameters_that_exist(path: Path) -> None:
    config = PipelineConfig.from_yaml(path)
    for stage in config.order():
        check(Path(config.folder) / stage.notebook, stage.given)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_runs_as_a_file_and_stays_small(tmp_path: Path) -> None:
    """As it is, but for where the report goes and what the run is called: `make test` runs the other tutorials by nbval."""
    executed = tmp_path / "quickstart.ipynb"
    parameters = {"report": str(tmp_path / "comparison.html"), "overrides": ["label=first"]}
    source = FOLDER / "tutorials" / "01_quickstart.ipynb"
    book = papermill.execute_notebook(str(source), str(executed), parameters, progress_bar=False, cwd=str(tmp_path))
    assert executed.stat().st_size <= MAX_BYTES
    assert "widgets" not in book.metadata
    last = "".join(output.text for output in book.cells[-1].outputs if output.output_type == "stream")
    assert "pruned, INT8" in last
    assert str(tmp_path / "comparison.html") in last
    assert (tmp_path / "comparison.html").stat().st_size > 0
    assert [run.status for run in Run.all()] == ["finished", "finished"]
    assert {run.config.label for run in Run.all()} == {"first", "pruned"}
