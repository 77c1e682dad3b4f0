"""Attributions that moved: maps of models whose credits are known."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from tests.comparison.conftest import QUICK
from workbench.attribution import AttributionConfig, explain
from workbench.attribution.agreement import cosine, patch_means, ranks
from workbench.comparison import compare
from workbench.comparison.measure import _draw, _Seen

ATTRIBUTING = QUICK.override({"attributions": 5})


class Half(nn.Module):
    """Class 1 by the sum of the left or the right half."""

    def __init__(self, right: bool = False) -> None:
        super().__init__()
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        seen = x[..., 8:] if self.right else x[..., :6]
        total = seen.sum((1, 2, 3))
        return torch.stack([-total, total], 1)


@pytest.fixture
def halves() -> list[tuple[Tensor, Tensor]]:
    x = torch.rand(30, 1, 14, 14, generator=torch.Generator().manual_seed(0)) + 0.1
    return list(zip(x.split(8), torch.ones(30, dtype=torch.int64).split(8), strict=True))


@pytest.mark.parametrize("method", ["occlusion", "integrated_gradients"])
def test_a_model_that_looks_elsewhere_is_found_out(halves: list[tuple[Tensor, Tensor]], method: str) -> None:
    variants = {"left": Half(), "again": Half(), "right": Half(right=True)}
    result = compare(variants, halves, ATTRIBUTING.override({"attribution_method": method}))
    assert result.frame().agreement.tolist() == [1, 1, 1]
    by_variant = {row.variant: (row.attribution_cosine, row.attribution_rank) for row in result.measurements}
    assert by_variant["left"] == (None, None)
    assert by_variant["again"] == pytest.approx((1.0, 1.0))
    assert by_variant["right"][0] == pytest.approx(0.0, abs=1e-6) and by_variant["right"][1] < 0
    assert len(result.moved) == 10 and sum(bool(m.picture) for m in result.moved) == 8
    moved = next(m for m in result.moved if m.variant == "right")
    position, sample = moved.sample, halves[moved.sample // 8][0][moved.sample % 8]
    assert 0 <= position < 30
    if method == "occlusion":
        expected = sample.reshape(7, 2, 7, 2).sum((1, 3))
        torch.testing.assert_close(torch.tensor(moved.before)[:, :3], expected[:, :3], rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(torch.tensor(moved.after)[:, 4:], expected[:, 4:], rtol=1e-2, atol=1e-4)
    page = result.to_html()
    assert "mean cosine 0.00" in page and page.count('alt="attribution"') == 16


def test_tokens_are_compared_without_pictures() -> None:
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 4, padding_idx=0)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.embedding(ids).sum(1)
            return out

    ids = torch.randint(1, 30, (20, 9))
    ids[:, 7:] = 0
    longer = torch.ones(3, 12, dtype=torch.int64)
    data = [(ids, torch.zeros(20, dtype=torch.int64)), (longer, torch.zeros(3, dtype=torch.int64))]
    result = compare({"a": Bag(), "b": Bag()}, data, ATTRIBUTING)
    assert result.conditions["samples"] == 23
    assert [len(m.before[0]) for m in result.moved] == [9] * 5
    assert all(m.before[0][7:] == [0, 0] and not m.picture for m in result.moved)
    assert "maps long" in result.to_html()


@given(values=st.lists(st.integers(0, 5), min_size=3, max_size=30), seed=st.integers(0, 100))
def test_ranks_are_spearmans(values: list[int], seed: int) -> None:
    a = torch.tensor(values, dtype=torch.float32)
    b = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))]
    if a.unique().numel() > 1:
        assert cosine(ranks(a), ranks(b)) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-9)


def test_a_grid_has_the_credit_of_each_patch() -> None:
    x = torch.randn(1, 3, 13, 9)
    model = nn.Sequential(nn.Flatten(), nn.Linear(351, 2))
    credits = explain(model, x, 0, "occlusion", AttributionConfig(patches=4))
    grid = patch_means(credits, 4)
    assert grid.shape == (4, 4)
    assert sorted(grid.flatten().tolist()) == pytest.approx(sorted(credits.unique().tolist()), abs=1e-5)


def test_every_sample_is_as_likely_to_be_drawn() -> None:
    drawn: Counter[int] = Counter()
    x, y = torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64)
    chance = random.Random(0)
    for _ in range(2000):
        seen = _Seen([])
        for part in (slice(0, 4), slice(4, 10)):
            _draw(seen, x[part], y[part], 3, chance)
            seen.labels += y[part].tolist()
        assert len(seen.drawn) == 3
        drawn.update(seen.drawn.keys())
    assert all(abs(count - 600) < 100 for count in drawn.values()) and len(drawn) == 10
