"""A notebook run by a program: panels are small summaries, and the file stays small."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from workbench.training.config import TrainConfig

CELLS = [
    "from widgets import ComparePanel, Explain, Inspector, PrunePanel, QuantizePanel, RunList, TrainPanel, Workbench",
    "TrainPanel()",
    "Workbench()",
    "RunList()",
    "PrunePanel()",
    "QuantizePanel()",
    "ComparePanel()",
    "Explain()",
]


@pytest.mark.slow
def test_an_executed_notebook_is_small(fake_run: object, tmp_path: Path) -> None:
    for _ in range(3):
        fake_run(TrainConfig(label="<b>bold</b>")).start().steps(1, 50).end()  # type: ignore[operator]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in book.cells[1:]]
    for output in outputs:
        html = output[0]["data"]["text/html"]
        assert "application/vnd.jupyter.widget-view+json" not in output[0]["data"]
        assert "<b>bold</b>" not in html
    assert "finished" in outputs[0][0]["data"]["text/html"]
    size = len(json.dumps(book))
    print(f"\nseven panels without a page: {size / 1000:.1f} KB")
    assert size < 200_000
