"""The Inspector in a real JupyterLab: live, chosen layers and steps, two runs, themes, reload, second window, busy kernel,
narrow window; and as a file, without network.

Runs are simulated by this process; the kernel only reads their folders. Times are printed and asserted only generously.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "widgets"))
from simulated import Simulation

pytestmark = [pytest.mark.ui, pytest.mark.timeout(300)]

CARD = ".wi-card[data-card={}]"
COLUMNS = """(card) => {
    const trace = document.querySelector(`.wi-card[data-card=${card}] .js-plotly-plot`)?.data?.[0];
    return (trace?.z?.[0] ?? trace?.x)?.length ?? 0 }"""


TOP_OF_SCALE = "() => document.querySelector('.wi-card[data-card=gradients] .js-plotly-plot').data[0].zmax"
DASHED = """() => document.querySelector('.wi-card[data-card=loss] .js-plotly-plot').data
    .filter((trace) => trace.line?.dash === 'dash').length"""
STEP_OF_MARK = """(mark) => {
    const { _fullLayout } = mark.closest('.wi-frame').querySelector('.js-plotly-plot');
    return _fullLayout.xaxis.p2l(new DOMMatrix(getComputedStyle(mark).transform).e - _fullLayout.xaxis._offset) }"""


def wait_until(condition: Any, timeout: float = 30) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, "it did not happen in time"
        time.sleep(0.1)
    return time.monotonic() - started


def shown(page: Any, card: str = "gradients") -> int:
    """Columns or points that the card's plot shows."""
    return int(page.evaluate(COLUMNS, card))


def into_view(book: Any, selector: str = ".wb-inspector") -> None:
    book.page.evaluate("(s) => document.querySelector(s).scrollIntoView()", selector)
    book.page.wait_for_timeout(500)


@pytest.fixture
def simulation(lab: Any, request: pytest.FixtureRequest) -> Any:
    name = request.node.name.replace("_", "-")
    made: list[Simulation] = []

    def make(**how: Any) -> Simulation:
        made.append(Simulation(lab.runs / name, **how))
        return made[-1]

    yield make
    for simulated in made:
        simulated.stop()


def notebook(lab: Any, simulated: Simulation, *more: str, before: str = "") -> Path:
    name = simulated.folder.name
    cell = f"{before}from widgets import Inspector\ninspector = Inspector({name!r})\ninspector"
    return Path(lab.notebook(f"{name}.ipynb", cell, *more))


def test_live_from_the_first_step_to_the_last(lab: Any, simulation: Any) -> None:
    simulated = simulation(total=700, ranks=2, blocks=(2, 2))
    path = notebook(lab, simulated)
    book = lab.open(path)
    started = time.monotonic()
    book.run_all()
    book.page.locator(".wi-waiting", has_text="waiting for the first reading of the gradients").wait_for()
    simulated.until(300)
    wait_until(lambda: shown(book.page) == 60)
    print(f"first plots {time.monotonic() - started:.1f} s after the cell, of which 60 readings written meanwhile")
    book.page.get_by_text("No findings").wait_for()
    simulated.until(400)
    wait_until(lambda: shown(book.page) == 80)

    wait_until(lambda: shown(book.page, "loss") == 400)
    page_loss = book.page.evaluate("() => document.querySelector('.wi-card[data-card=loss] .js-plotly-plot').data[0].y")
    kernel_loss = eval(book.result("inspector.recording.lines['loss'].arrays()[1].tolist()"))
    assert page_loss == pytest.approx(kernel_loss, rel=1e-6)
    top = book.page.evaluate(
        "() => Array.from(document.querySelector('.wi-card[data-card=gradients] .js-plotly-plot').data[0].z[0])"
    )
    norms = eval(book.result("__import__('numpy').log10(inspector.recording.gradients.values[:, 0]).tolist()"))
    assert top == pytest.approx(norms, rel=1e-4)

    into_view(book, CARD.format("communication"))  # cards out of sight wait
    wait_until(lambda: shown(book.page, "communication") == 80)
    times = book.page.locator(CARD.format("communication"))
    assert "Exposed communication" in times.inner_text() and "NVLink, 18 links, 309 GB/s" in times.inner_text()

    book.page.locator(".wi-card[data-card=gradients] .nsewdrag").click(position={"x": 40, "y": 30})
    book.page.locator(".wi-detail:visible").wait_for()
    chosen = book.page.locator(".wi-detail > header h3").inner_text()
    assert chosen in simulated.parameters
    into_view(book, ".wi-detail")
    wait_until(lambda: shown(book.page, "norm") == 80 and shown(book.page, "values") > 0)
    into_view(book)
    book.screenshot("inspector-light")
    book.theme("dark")
    ink = "() => document.querySelector('.wi-card[data-card=loss] .xtick text').style.fill"
    wait_until(lambda: min(int(v) for v in book.page.evaluate(ink).strip("rgba()").split(",")[:3]) > 120)
    book.screenshot("inspector-dark")
    book.theme("light")
    book.page.get_by_role("button", name="Close the layer's history").click()
    book.page.locator(".wi-detail").wait_for(state="hidden")

    book.page.get_by_label("Rank").select_option("1")
    wait_until(lambda: book.result("inspector.recording.rank") == "1")
    slider = book.page.get_by_label("Step to show")
    slider.press("Home")
    book.page.locator(CARD.format("activations"), has_text="at step 5").wait_for()
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    book.page.locator(CARD.format("activations"), has_text="at step 15").wait_for()
    book.page.locator(".wi-time output", has_text="step 15").wait_for()
    into_view(book, CARD.format("memory"))
    value = book.page.locator(f"{CARD.format('memory')} .wi-mark.cursor").evaluate(STEP_OF_MARK)
    assert value == pytest.approx(15, abs=0.5), "every card's cursor stands at the step"
    slider.press("Escape")
    book.page.locator(CARD.format("activations"), has_text="at step 400").wait_for()

    simulated.until(700).finish()
    book.page.locator(".wi-head .chip.finished").wait_for()
    wait_until(lambda: book.result("inspector.following") == "False")
    wait_until(lambda: "redraw_ms_median" in book.result("inspector.stats.summary()"))
    summary = eval(book.result("inspector.stats.summary()"))
    print(summary)
    assert summary["frame_bytes_median"] < 60_000 and summary["redraw_ms_median"] < 1000
    assert not book.errors


def test_a_new_page_and_a_new_kernel_get_the_whole_history(lab: Any, simulation: Any) -> None:
    simulated = simulation(blocks=(1, 1)).until(200)
    book = lab.open(notebook(lab, simulated))
    book.run_all()
    wait_until(lambda: shown(book.page) == 40)
    book.page.locator(CARD.format("communication")).wait_for(state="hidden")  # one rank waits for no other
    book.command("docmanager:save")
    other = lab.open(f"{simulated.folder.name}.ipynb")
    print(f"a second window draws {wait_until(lambda: shown(other.page) == 40):.1f} s after it opened")
    simulated.until(250)
    wait_until(lambda: shown(book.page) == 50 and shown(other.page) == 50)
    other.page.close()
    book.restart()
    book.run_all()
    wait_until(lambda: shown(book.page) == 50)
    assert not book.errors


def test_a_busy_kernel_still_shows_and_answers(lab: Any, simulation: Any) -> None:
    simulated = simulation(blocks=(1, 1)).until(100)
    book = lab.open(
        notebook(lab, simulated, "import time\nuntil = time.time() + 20\nwhile time.time() < until: time.sleep(0.05)")
    )
    book.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    wait_until(lambda: shown(book.page) == 20, timeout=18)
    simulated.until(150)
    wait_until(lambda: shown(book.page) == 30, timeout=15)
    book.page.get_by_label("Layer whose gradients").select_option("conv1.weight")
    book.page.locator(".wi-detail:visible").wait_for(timeout=12_000)
    prompts = book.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert prompts[1] == "[*]:", "the cell ended too early to tell"
    assert not book.errors


def test_plotly_travels_once_for_many_plots(lab: Any, simulation: Any) -> None:
    simulated = simulation(blocks=(1,)).until(50)
    more = "from widgets import LivePlot\nfrom widgets.live_plot import plotly_loader, compressed_plotly\n"
    more += "plot = LivePlot({'loss': {}})\nplot.append('loss', range(100), range(100))\nplot"
    # A page that is slow to answer would get it unasked, and once more.
    patient = "from widgets.live_plot import PlotlyLoader\nPlotlyLoader.GRACE = 60.0\n"
    second = f"second = Inspector({simulated.folder.name!r})\nsecond"
    book = lab.open(notebook(lab, simulated, second, more, before=patient))
    book.run_all()
    for place in (".wb-inspector >> nth=0", ".wb-inspector >> nth=1", ".wb-live"):
        book.page.locator(place).scroll_into_view_if_needed()  # what is out of sight is not drawn
        book.page.locator(f"{place} >> .js-plotly-plot >> nth=0").wait_for()
    assert book.result("plotly_loader().sent == len(compressed_plotly())") == "True"
    book.run_all()
    wait_until(lambda: book.page.locator(".js-plotly-plot").count() >= 1)
    assert book.result("plotly_loader().sent == len(compressed_plotly())") == "True"
    assert not book.errors


def test_names_are_text_and_a_narrow_window_holds_everything(lab: Any, simulation: Any) -> None:
    simulated = simulation(fault="vanishing", blocks=(2, 2), rich=True)
    simulated.parameters[1] = "<img src=x onerror=window.pwned=1>.weight"
    simulated.until(300)
    Simulation(lab.runs / "another", blocks=(2, 1)).until(200).finish()
    book = lab.open(notebook(lab, simulated), width=800)
    book.run_all()
    wait_until(lambda: shown(book.page) == 60)
    book.page.get_by_text("Gradients vanish").wait_for()
    book.page.get_by_role("button", name="show the layer").first.click()
    book.page.locator(".wi-detail:visible").wait_for()
    book.page.get_by_label("Layer whose gradients").select_option(simulated.parameters[1])
    book.page.locator(".wi-detail > header h3", has_text="<img").wait_for()
    assert book.page.evaluate("() => window.pwned === undefined && !document.querySelector('.wb-inspector img')")
    into_view(book)
    book.screenshot("inspector-narrow")
    spilt = """() => [...document.querySelectorAll('.wb-inspector, .wb-inspector section, .wb-inspector header')]
        .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map((e) => e.className || e.tagName)"""
    assert book.page.evaluate(spilt) == []

    book.page.get_by_label("Quantity of the gradients").select_option("underflow")
    wait_until(lambda: book.page.evaluate(TOP_OF_SCALE) <= 1)  # a share, no longer a power of ten
    book.page.get_by_label("Run to compare with").select_option("another")
    book.page.get_by_text("the same settings").wait_for()
    wait_until(lambda: book.page.evaluate(DASHED) == 3)  # the other's loss, held-out loss and accuracy
    book.page.get_by_label("Quantity of the gradients").select_option("norm")
    book.page.get_by_role("button", name="ratio").click()
    wait_until(lambda: book.page.evaluate(TOP_OF_SCALE) > 5)  # decades, of gradients that vanish in one run only
    rows = book.page.evaluate(
        "() => document.querySelector('.wi-card[data-card=gradients] .js-plotly-plot').data[0].z.map((r) => [...r])"
    )
    known = [math.isfinite(row[10]) for row in rows]
    names = ["conv1.weight" in name or "layer" in name or "fc" in name or "bn1" in name for name in simulated.parameters]
    assert sum(known) < sum(names) and not known[1], "layers that the other run lacks are blank"
    into_view(book)
    book.screenshot("inspector-compared")
    with book.page.expect_download() as saved:
        book.page.get_by_role("button", name="Export").click()
    assert saved.value.suggested_filename == f"{simulated.folder.name}.html"
    assert not book.errors
    the_file_works_without_network(book.page.context.browser, Path(saved.value.path()), lab.home / "exported.html")


def the_file_works_without_network(browser: Any, saved: Path, path: Path) -> None:
    """Over file://, without network: it draws, is scrubbed, and shows a layer, and complains of nothing."""
    path.write_bytes(saved.read_bytes())
    assert path.stat().st_size < 6_000_000
    context = browser.new_context(offline=True, viewport={"width": 1100, "height": 1600}, color_scheme="dark")
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    wait_until(lambda: shown(page) == 60 and shown(page, "loss") == 300)
    page.locator(".wi-beside", has_text="another").wait_for()
    assert page.evaluate("() => document.body.dataset.jpThemeLight") == "false"
    page.get_by_label("Step to show").press("Home")
    page.locator(CARD.format("activations"), has_text="at step 5").wait_for()
    page.locator(".wi-rows button[title='conv1.weight']").click()
    wait_until(lambda: shown(page, "norm") == 60 and shown(page, "values") == 60)
    page.get_by_role("button", name="ridges").click()
    wait_until(
        lambda: page.evaluate("() => document.querySelector('.wi-card[data-card=values] .js-plotly-plot').data.length") == 24
    )
    assert page.evaluate("() => window.pwned === undefined && !document.querySelector('img')")
    assert not complaints
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
    context.close()
