"""How far credits moved: known models, and what chance gives, against every order there is."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.attribution import AttributionConfig, moved
from workbench.attribution.agreement import chance_cosine, cosine, overlap, ranks
from workbench.compress import QuantConfig, quantize
from workbench.errors import DataError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_model_agrees_with_its_copy_and_not_with_its_negative(images: Tensor) -> None:
    model = network()
    same = moved(model, copy.deepcopy(model), images, config=AttributionConfig(patches=4))
    assert same.parts == 16 and same.largest == 3 and not same.note
    assert same.mean[["cosine", "rank", "overlap"]].tolist() == pytest.approx([1, 1, 1])
    assert same.mean.overlap_by_chance == pytest.approx(3 / 16)
    negative = copy.deepcopy(model)
    with torch.no_grad():
        negative[3].weight.neg_()
    away = moved(model, negative, images)
    assert away.mean[["cosine", "rank", "overlap"]].tolist() == pytest.approx([-1, -1, 1], abs=1e-5)
    assert "5 answers changed" in repr(away) or (away.samples.answer != away.samples.new_answer).sum() < 5
    assert "by chance" in away._repr_html_()


def test_the_sample_that_moved_most_comes_first(images: Tensor) -> None:
    model, other = network(), network()
    with torch.no_grad():
        other[3].weight += 0.05 * torch.randn_like(other[3].weight)
    found = moved(model, other, images).samples
    assert found.cosine.is_monotonic_increasing and sorted(found["sample"]) == [0, 1, 2, 3, 4]
    assert (found.cosine_of_another < found.cosine).any()
    assert "cosine_of_another" not in moved(model, other, images[:1]).samples


def test_what_has_no_gradients_is_explained_by_occlusion_on_both_sides(images: Tensor) -> None:
    model = network()
    int8 = quantize(model, QuantConfig(), images)
    found = moved(model, int8, images)
    assert found.method == "occlusion" and "The second has no gradients" in found.note and found.note in repr(found)
    by_choice = moved(model, int8, images, method="occlusion")
    assert not by_choice.note and by_choice.samples.equals(found.samples)
    assert found.mean.cosine > 0.9


@given(
    a=st.lists(st.integers(-4, 4), min_size=4, max_size=4),
    b=st.lists(st.integers(-4, 4), min_size=4, max_size=4),
    count=st.integers(1, 3),
)
@settings(max_examples=40)
def test_chance_is_the_mean_over_every_order(a: list[int], b: list[int], count: int) -> None:
    one, other = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    orders = [other[list(order)] for order in itertools.permutations(range(4))]
    if one.norm() and other.norm():
        assert chance_cosine(one, other) == pytest.approx(sum(cosine(one, o) for o in orders) / 24, abs=1e-9)
    if one.unique().numel() > 1 and other.unique().numel() > 1:
        assert sum(cosine(ranks(one), ranks(o)) for o in orders) == pytest.approx(0, abs=1e-9)
    if other.abs().unique().numel() == 4:  # of equal parts, either may count among the largest
        assert sum(overlap(one, o, count) for o in orders) / 24 == pytest.approx(count / 4)


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        moved(network(), network(), torch.zeros(0, 1, 8, 8))
