"""The explanation panel in a real JupyterLab: a click finds the worst mistakes, another shows one; light and dark."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.ui, pytest.mark.timeout(300)]

PANEL = """\
import torch
from torch import nn
from widgets import Explain
from workbench.data import DataConfig, load_batches
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for x, y in load_batches(DataConfig(name="digits"), "train"):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
panel = Explain(model, load_batches(DataConfig(name="digits")))
panel"""


def test_a_click_shows_what_the_model_looks_at(lab: Any) -> None:
    lab.notebook("explain.ipynb", PANEL)
    book = lab.open("explain.ipynb", width=1280, height=1000)
    book.run_all()
    page = book.page
    act = page.get_by_role("button", name="Explain", exact=True)
    act.wait_for()
    page.locator(".wb-panel").evaluate("(element) => element.scrollIntoView()")
    book.screenshot("explain-empty-light")
    act.click()
    rows = page.locator(".wb-samples tbody tr")
    rows.nth(11).wait_for()
    caption = page.locator(".wb-panel .wbx .cap b")
    first = caption.inner_text()
    assert "taken for" in first
    rows.nth(4).click()
    page.locator(".wb-samples tr.current").nth(0).wait_for()
    page.wait_for_function("(before) => document.querySelector('.wb-samples tr.current').rowIndex === 5", arg=first)
    heat = page.locator('.wb-panel img[alt="attribution"]')
    assert heat.evaluate("(image) => image.complete && image.naturalWidth") == 8
    shades = []
    for theme in ("light", "dark"):
        book.theme(theme)
        shades.append(caption.evaluate("(element) => getComputedStyle(element).color"))
        book.screenshot(f"explain-{theme}")
    assert shades[0] != shades[1]
    assert book.result("panel.explained[4].prediction == panel.explained[4].target") == "True"
    assert not book.errors
    book.ask("panel.close()")
