"""The comparison panel in a real JupyterLab: what is worse is red, in light and dark, and the page opens beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.comparison import CompareConfig, Comparison, compare
from workbench.run import Run
from workbench.training.config import TrainConfig

pytestmark = [pytest.mark.ui, pytest.mark.timeout(300)]
COLOUR = "(element) => getComputedStyle(element).color"
CONTRAST = """(element) => {
    const parts = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (colour) => parts(colour).map((v) => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor;
    const [high, low] = [light(getComputedStyle(element).color), light(behind)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05) }"""


class Half(nn.Module):
    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        total = x[..., self.columns].sum((1, 2, 3))
        return torch.stack([-total, total], 1)


def compared() -> Comparison:
    x = torch.randn(200, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    left = Half(slice(0, 8))
    config = CompareConfig(rounds=3, compile=False, reload=False, attributions=4, batch_sizes=[1, 8])
    return compare({"left": left, "right": Half(slice(6, 14))}, [(x, left(x).argmax(1))], config, class_names=["cold", "warm"])


@pytest.fixture
def run(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with a comparison that has finished."""
    monkeypatch.setenv("WORKBENCH_RUNS", str(lab.runs))
    made = Run.create(TrainConfig(), label="compared")
    (made.path / "model.safetensors").write_bytes(b"")
    folder = made.path / "comparisons" / "compare-1"
    folder.mkdir(parents=True)
    result = compared()
    result.to_html(folder / "comparison.html")
    (folder / "action.py").write_text("# made by the test\n")
    (folder / "result.json").write_text(
        json.dumps({"status": "finished", "time": 0, "rows": [], "warnings": [], "comparison": result.to_json()})
    )
    return made


def test_what_is_worse_is_red_in_both_themes(lab: Any, run: Run) -> None:
    lab.notebook(
        "compare.ipynb", f"from widgets import ComparePanel\nfrom workbench import Run\nComparePanel(Run.open({run.id!r}))"
    )
    book = lab.open("compare.ipynb", width=1500, height=1300)
    book.run_all()
    page = book.page
    worse = page.locator(".wbc td.bad").first
    worse.wait_for()
    assert "▲" in worse.evaluate("(element) => getComputedStyle(element, '::before').content")
    book.screenshot("compare-form")
    page.evaluate("document.querySelector('.wbc').scrollIntoView()")
    shades = []
    for theme in ("light", "dark"):
        book.theme(theme)
        red, green, blue = (float(part) for part in worse.evaluate(COLOUR).strip("rgb()").split(",")[:3])
        assert red > 1.5 * max(green, blue)
        assert worse.evaluate(CONTRAST) > 4.5
        assert page.locator(".wbc td.form").first.evaluate(CONTRAST) > 7
        shades.append((red, green, blue))
        book.screenshot(f"compare-{theme}")
    assert shades[0] != shades[1]
    assert page.locator(".wbc figure svg .frontier").count() == 3
    assert page.locator('.wbc img[alt="attribution"]').count() == 8
    with page.context.expect_page() as opened:
        page.get_by_role("button", name="Open the report").click()
    report = opened.value
    report.locator("h1", has_text="Comparison").wait_for()
    assert Path(run.path / "comparisons" / "compare-1" / "comparison.html").stat().st_size < 100_000
    assert not book.errors
