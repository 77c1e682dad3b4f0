"""What a comparison says: rows, flags, classes, and the faces they are shown with."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.comparison.conftest import QUICK
from workbench import PruneConfig, compare, prune
from workbench.comparison import Comparison, paired_difference
from workbench.comparison.drawing import small_multiples
from workbench.comparison.measure import _rebatched
from workbench.comparison.result import Flag, Latency, on_frontier
from workbench.compress.compilation import has_compiler
from workbench.compress.cost import count_macs
from workbench.data import DataConfig, load_batches
from workbench.data.cards import read_card
from workbench.errors import ConfigError, DeviceError

EVIL = "<img src=x onerror=alert(1)>"


class Fixed(nn.Module):
    """Answers by position in a list, as the first value of a sample says."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.register_buffer("answers", answers)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.answers[x[:, 0].long()], 3).float()


@pytest.fixture(scope="module")
def told() -> Comparison:
    """200 samples of two classes of 90 and one of 20; the second model loses 30 of class 1, and wins 2 of class 2."""
    y = torch.tensor([0] * 90 + [1] * 90 + [2] * 20)
    before = y.clone()
    before[180:184] = 0
    after = before.clone()
    after[90:120] = 0
    after[180:182] = 2
    x = torch.arange(200.0)[:, None]
    return compare({EVIL: Fixed(before), "lossy": Fixed(after)}, [(x, y)], QUICK, class_names=["cat", EVIL, "dog"])


def test_changes_are_paired(told: Comparison) -> None:
    first, second = told.measurements
    assert first.change is None and first.origin is None
    assert (second.lost, second.won, second.change) == (30, 2, -28 / 200)
    assert second.origin == f"{EVIL}, eager fp32"
    assert (second.change_low, second.change_high) == paired_difference(2, 30, 200)
    assert second.change_high < 0 and "accuracy" in second.flags


def test_the_classes_that_lost_most_come_first(told: Comparison) -> None:
    frame = told.classes_frame()
    assert frame.label.tolist() == [1, 0, 2]
    assert frame.sure.tolist() == [True, False, False]
    assert frame.lost.tolist() == [30, 0, 0] and frame.won.tolist() == [0, 0, 2]
    assert frame.before.tolist() == [1, 1, 16 / 20]
    assert frame.name.tolist() == [EVIL, "cat", "dog"]
    assert "1 of 3 classes lost more than chance explains." in told.to_html()


def test_classes_have_the_names_of_their_data_set() -> None:
    data = load_batches(DataConfig(name="digits"))
    result = compare({"a": nn.Flatten(), "b": nn.Flatten()}, data, QUICK)
    assert result.class_names == list(read_card("digits").classes)
    assert {change.name for change in result.classes} <= set(result.class_names)


def test_a_frontier_is_what_nothing_beats() -> None:
    points = [(0.1, 5.0, 9.0), (0.2, 4.0, 9.0), (0.2, 4.0, 9.0), (0.2, 5.0, 9.0), (0.3, 1.0, 1.0)]
    assert on_frontier(points) == [True, True, True, False, True]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_everything_off_the_frontier_is_beaten_by_something_on_it(points: list[tuple[float, ...]]) -> None:
    best = on_frontier(points)
    assert any(best)
    for point, on in zip(points, best, strict=True):
        beaten = any(b and o != point and o[0] <= point[0] and o[1] <= point[1] for o, b in zip(points, best, strict=True))
        assert beaten != on


def test_numbers_survive_csv_and_json(told: Comparison, tmp_path: Path) -> None:
    told.to_csv(tmp_path / "deep" / "table.csv")
    with (tmp_path / "deep" / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, measured in zip(rows, told.measurements, strict=True):
        assert float(row["accuracy_low"]) == measured.accuracy_low and float(row["kl"]) == measured.kl
        assert float(row["latency_p50_ms"]) == measured.latency_p50_ms
        assert float(row["batch8_p95_ms"]) == measured.latencies[1].p95_ms
        assert row["variant"] == measured.variant
    assert Comparison.from_json(told.to_json()) == told
    json.loads(told.to_json())
    assert next(iter(csv.reader(io.StringIO(told.to_csv())))) == list(told.frame().columns)


def test_what_is_worse_is_red_and_says_why(told: Comparison) -> None:
    flags = [
        Flag("lossy", "eager fp32", what, f"because of {what}") for what in ("latency", "batch8", "file", "memory", "reload")
    ]
    row = replace(told.measurements[1], memory_bytes=5_000_000, reload="differs by 1.0e-01")
    marked = replace(told, measurements=[told.measurements[0], row.with_flags(flags)], flags=flags)
    for html in (marked.to_html(), marked._repr_html_()):
        assert [html.count(f'title="because of {flag.what}"') for flag in flags] == [1] * 5
        assert html.count('<p class="flag">because of') == 5
    assert "latency batch8 file memory reload" in str(marked)


def test_the_page_is_small_safe_and_needs_nothing_else(told: Comparison) -> None:
    html = told.to_html()
    assert len(html) < 60_000
    assert (
        EVIL not in html
        and EVIL not in told._repr_html_()
        and "<script" not in html
        and "http" not in html.replace("http-equiv", "")
    )
    for _, svg in small_multiples(told.measurements):
        marks = [group for group in ElementTree.fromstring(svg).iter("g") if "mark" in group.get("class", "")]
        assert len(marks) == 2


def test_far_apart_costs_are_drawn_by_their_logarithm(told: Comparison) -> None:
    rows = [replace(row, latencies=(Latency(1, ms, ms, 1.0),)) for row, ms in zip(told.measurements, (1.0, 500.0), strict=True)]
    svg = small_multiples(rows)[0][1]
    labels = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert {"1", "10", "100"} <= set(labels)


def test_macs_are_those_of_one_sample(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    small = prune(model, PruneConfig(ratio=0.46, round_to=1), data[0])
    rows = compare({"a": model, "b": small}, data, QUICK).measurements
    x = data[0][0][:1]
    assert [row.macs for row in rows] == [count_macs(model, x), count_macs(small, x)]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(1, 8))
def test_batches_are_cut_anew_and_nothing_is_lost(sizes: list[int], size: int) -> None:
    x = torch.arange(float(sum(sizes)))[:, None]
    batches = list(zip(x.split(sizes), x.long().flatten().split(sizes), strict=True))
    made = list(_rebatched(batches[0], batches[1:], size))
    assert torch.equal(torch.cat([x for x, _ in made]), x) and torch.equal(torch.cat([y for _, y in made]), x.long().flatten())
    assert all(len(x) == size for x, _ in made[:-1]) and 1 <= len(made[-1][0]) <= size


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_what_does_not_compile_is_measured_as_it_is() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    data = [(torch.rand(8, 3), torch.zeros(8, dtype=torch.int64))]
    result = compare({"branching": Branching()}, data, QUICK.override({"compile": True}))
    assert [row.form for row in result.measurements] == ["eager fp32"]
    assert any(note.startswith("branching isn't compiled: ") and "one graph" in note for note in result.notes)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="must rise"):
        QUICK.override({"batch_sizes": [32, 1]})
    with pytest.raises(ConfigError, match="saliency"):
        QUICK.override({"attribution_method": "salience"})
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="device='cpu'"):
            compare({"a": nn.Flatten()}, [(torch.zeros(1, 2), torch.zeros(1).long())], QUICK.override({"device": "cuda"}))
