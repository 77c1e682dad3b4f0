"""A run's page: self-contained, escaped, whatever state the run is in."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from workbench import events, launcher
from workbench.cli import main
from workbench.report import POINTS, Curve, chart, thinned, ticks, write_report
from workbench.run import Run
from workbench.storage import Journal
from workbench.training.config import TrainConfig

EVIL = '<script>alert("x")</script>'


def told(*said: events.Event, label: str = "") -> Run:
    """A run whose trainer said this."""
    run = Run.create(TrainConfig(label=label))
    attempt = launcher.claim(run.path, 1)
    journal = Journal(run.path / "events" / "rank-00000.jsonl")
    for event in said:
        journal.append(event.model_copy(update={"attempt": attempt}).model_dump_json())
    journal.close()
    return run


START = events.AttemptStarted(total_steps=50, steps_per_epoch=10, world_size=1, device="cpu", parameters=1234)


def steps(first: int, losses: list[float | None]) -> events.Steps:
    last = first + len(losses) - 1
    return events.Steps(step=last, first=first, loss=losses, lr=[0.1] * len(losses), epoch=1, samples_per_s=100.0)


class Page(HTMLParser):
    """What a page holds: its tags, and whatever would make a browser fetch or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.active: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("script", "link", "iframe", "object", "img", "embed"):
            self.active.append(tag)
        self.active += [name for name, _ in attributes if name in ("src", "href", "action", "data") or name.startswith("on")]


def test_a_run_as_one_page_without_requests() -> None:
    run = told(
        START,
        steps(1, [2.0, 1.5, 1.0]),
        events.Evaluated(step=3, epoch=1, metrics={"val_loss": 1.1, "accuracy": 0.7}),
        events.Finished(step=3, metrics={"accuracy": 0.7}),
    )
    path = write_report(run)
    text, page = path.read_text(), Page(path.read_text())
    assert path == run.path / "report.html"
    assert page.active == []
    assert page.tags.count("svg") == 3
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert "0.7000" in text
    assert "1,234" in text
    assert len(text) < 100_000


def test_names_are_escaped(tmp_path: Path) -> None:
    finding = events.Finding(step=1, name="x", severity="warning", message=EVIL, remedy={EVIL: EVIL})
    failed = events.Failed(step=1, error="Error", message=EVIL)
    metric = events.Evaluated(step=1, epoch=1, metrics={EVIL: 0.5})
    run = told(START, steps(1, [2.0]), metric, finding, failed, label=EVIL)
    text = write_report(run, tmp_path / "deep" / "page.html").read_text()
    assert "<script" not in text.casefold()
    assert Page(text).active == []
    assert text.count("&lt;script&gt;") >= 5


@pytest.mark.parametrize("said", [(), (START,), (START, steps(1, [None, None])), (START, steps(1, [1.0]))])
def test_a_run_with_little_to_show(said: tuple[events.Event, ...]) -> None:
    assert "<h2>Settings</h2>" in write_report(told(*said)).read_text()


def test_the_command_line_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = told(START, steps(1, [1.0]))
    assert main(["report", run.id, "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()


def test_a_chart_is_small_and_breaks_where_values_are_missing() -> None:
    xs = list(range(100_000))
    ys = [math.sin(x / 1000) for x in xs]
    ys[500] = 40.0
    kept = thinned(Curve("a", xs, ys))
    assert len(kept) <= POINTS + 2
    assert (500, 40.0) in kept
    assert kept == sorted(kept)
    assert len(chart([Curve("a", xs, ys)])) < 8_000
    broken = chart([Curve("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, math.inf])])
    path = re.search(r'class="curve c0" d="([^"]*)"', broken)
    assert path is not None
    assert path.group(1).count("M") == 2
    assert "nan" not in broken
    assert "inf" not in broken
    assert "no finite values" in chart([Curve("a", [1], [math.nan])])
    assert "nan" not in chart([Curve("a", [1, 2, 3], [0.0, -1.0, 10.0])], log=True)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 1000.0), (0.00011, 0.00012), (5.0, 5.0)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
