"""The samples that a model is most wrong about, against sorting all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.attribution import AttributionConfig, most_wrong, pick_samples
from workbench.errors import ConfigError, DataError


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), count=st.integers(1, 12), size=st.integers(1, 6))
@settings(max_examples=15)
def test_they_are_those_with_the_largest_loss(sizes: list[int], count: int, size: int) -> None:
    chance = torch.Generator().manual_seed(sum(sizes))
    x, y = torch.randn(sum(sizes), 4, generator=chance), torch.randint(0, 3, (sum(sizes),), generator=chance)
    model = linear()
    asked = []

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in zip(x.split(sizes), y.split(sizes), strict=True):
            asked.append(1)
            yield batch

    found = most_wrong(model, data(), count, "saliency", AttributionConfig(batch_size=size))
    losses = F.cross_entropy(model(x), y, reduction="none").detach()
    order = losses.argsort(descending=True, stable=True)[:count].tolist()
    assert [e.sample for e in found] == order and len(asked) == len(sizes)
    assert [e.loss for e in found] == pytest.approx(losses[order].tolist(), rel=1e-4)
    assert [e.label for e in found] == y[order].tolist()
    assert all(torch.equal(e.x, x[i]) and e.target == e.prediction for e, i in zip(found, order, strict=True))


def test_of_equal_losses_the_first_counts() -> None:
    x, y = torch.ones(7, 4), torch.zeros(7, dtype=torch.int64)
    found = most_wrong(linear(), zip(x.split(2), y.split(2), strict=True), 3, "saliency")
    assert [e.sample for e in found] == [0, 1, 2]


def test_texts_of_different_lengths_keep_their_order() -> None:
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 3, padding_idx=0)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.embedding(ids).sum(1)
            return out

    data = [(torch.randint(1, 30, (4, length)), torch.randint(0, 3, (4,))) for length in (5, 9, 5)]
    found = most_wrong(Bag(), data, 12)
    losses = [e.loss or 0 for e in found]
    assert losses == sorted(losses, reverse=True)
    assert {tuple(e.x.shape) for e in found} == {(5,), (9,)} and sorted(e.sample or 0 for e in found) == list(range(12))


def test_errors_name_the_remedy() -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="at least one"):
        most_wrong(linear(), [(x, y)], 0)
    with pytest.raises(DataError, match="no samples"):
        most_wrong(linear(), [])
    with pytest.raises(DataError, match="not \\(x, y\\)"):
        most_wrong(linear(), [x])
    with pytest.raises(DataError, match="for 3 classes"):
        most_wrong(linear(), [(x, y + 1)])
    with pytest.raises(DataError, match="one class index"):
        most_wrong(linear(), [(x, y.float())])


def test_samples_are_picked_by_place() -> None:
    x, y = torch.randn(9, 4), torch.arange(9)
    picked, labels = pick_samples(zip(x.split(4), y.split(4), strict=True), [7, 0, 7])
    assert torch.equal(picked, x[[7, 0, 7]]) and labels.tolist() == [7, 0, 7]
    with pytest.raises(DataError, match="no sample 9, 12. Take 0 … 8"):
        pick_samples([(x, y)], [9, 1, 12])
