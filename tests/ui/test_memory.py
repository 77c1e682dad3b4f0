"""The Inspector's memory card in a browser: the stack, the layers, a snapshot within the page, light and dark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "widgets"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from pretend_gpu import Training
from simulated import Simulation

from workbench import Run
from workbench.snapshots import convert, write_snapshot

CARD = ".wi-card[data-card=memory]"


@pytest.fixture
def run(lab: Any) -> Run:
    folder = lab.runs / "memory"
    Simulation(folder, blocks=(2, 2, 2)).until(100)
    training = Training()
    for number in (1, 2):
        training.step(number)
    facts = {"step": 2, "first": 1, "rank": 0, "recorded": True, "device": "pretend GPU", "reason": "asked for"}
    content = convert(training.gpu.snapshot(), known=training.known, marks=training.marks, facts=facts)
    write_snapshot(folder / "snapshots", "step-2-rank-0", {}, content)
    return Run(folder)


def test_the_memory_card_shows_what_holds_it_and_opens_a_snapshot(lab: Any, run: Run) -> None:
    path = lab.notebook("memory.ipynb", f"from widgets import Inspector\ninspector = Inspector({run.id!r})\ninspector")
    book = lab.open(path, height=900)
    book.run_all()
    card = book.page.locator(CARD)
    card.locator(".js-plotly-plot").wait_for()
    stack = f"() => document.querySelector('{CARD} .js-plotly-plot').data.filter((t) => t.stackgroup)"
    stack += ".map((t) => [t.name, t.y.at(-1)])"
    held = dict(book.page.evaluate(stack))
    readings = run.readings("memory").iloc[-1]
    for name in ("parameters", "activations"):
        assert held[name] == pytest.approx(readings[name] / 1e6, rel=1e-3)
    assert sum(held.values()) == pytest.approx(readings["forward"] / 1e6, rel=0.01)
    assert "the end of the forward pass" in card.inner_text()
    card.scroll_into_view_if_needed()
    book.screenshot("memory-light")

    card.get_by_role("button", name="by layer").click()
    card.locator(".wi-layers li").nth(12).wait_for()
    assert "other layers" in card.locator(".wi-layers li").last.inner_text()
    book.theme("dark")
    book.screenshot("memory-layers-dark")
    card.get_by_role("button", name="over time").click()
    card.locator(".main-svg").first.wait_for()
    book.screenshot("memory-dark")

    card.get_by_role("button", name="Snapshot").click()
    card.get_by_text("this run is on a CPU").wait_for()
    card.get_by_label("Memory snapshot to open").select_option("step-2-rank-0")
    page = book.page.frame_locator(".wi-snapshot iframe")
    page.get_by_text("Memory of rank 0, steps 1 to 2").wait_for()
    assert page.locator("html").get_attribute("data-theme") == "dark" and page.locator("canvas").count() == 2
    page.get_by_role("button", name="by line of code").click()
    page.get_by_text("no Python frame (backward pass)").first.wait_for()
    book.page.locator(".wi-snapshot").scroll_into_view_if_needed()
    book.screenshot("memory-snapshot-dark")
    book.page.get_by_role("button", name="Close the snapshot").click()
    book.page.locator(".wi-snapshot").wait_for(state="hidden")
    assert not book.errors
