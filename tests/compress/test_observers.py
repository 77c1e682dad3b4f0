"""Ranges against closed forms and numpy; scales against PyTorch's own quantization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.compress.observers import (
    BINS,
    MOMENTUM,
    Seen,
    least_divergence,
    least_squares,
    minmax,
    moving_average,
    percentile,
    quantized,
    scale_and_zero_point,
    weight_scale,
)
from workbench.compress.quantization_config import OBSERVERS, QuantConfig

AFFINE, SYMMETRIC = QuantConfig(), QuantConfig(quant_scheme="symmetric")


def seen(*batches: Tensor) -> Seen:
    values = torch.cat([batch.flatten() for batch in batches]).double()
    lows, highs = (torch.tensor([f(batch).item() for batch in batches], dtype=torch.float64) for f in (torch.min, torch.max))
    counts, _ = np.histogram(values.numpy(), bins=BINS, range=(lows.min().item(), highs.max().item()))
    return Seen(lows, highs, torch.from_numpy(counts).double())


def error(x: Tensor, low: float, high: float, config: QuantConfig = AFFINE) -> float:
    return (quantized(x.double(), torch.tensor(low).double(), torch.tensor(high).double(), config) - x).square().mean().item()


@pytest.fixture(scope="module")
def bell() -> Tensor:
    return torch.randn(200_000, generator=torch.Generator().manual_seed(0))


@given(low=st.floats(-100, 100), width=st.floats(0.01, 200), bits=st.sampled_from([7, 8]))
@settings(max_examples=200, deadline=None)
def test_scales_are_pytorchs_and_zero_is_exact(low: float, width: float, bits: int) -> None:
    from torchao.quantization.pt2e.observer import MinMaxObserver

    ends = torch.tensor([low, low + width])
    for scheme, qscheme in (("affine", torch.per_tensor_affine), ("symmetric", torch.per_tensor_symmetric)):
        config = QuantConfig(activation_bit=bits, quant_scheme=scheme)
        scale, zero = scale_and_zero_point(ends[0], ends[1], config)
        assert 0 <= zero <= 2**bits - 1 and zero == zero.round()
        assert quantized(torch.zeros(1), ends[0], ends[1], config).item() == 0
        if scheme == "symmetric" and (ends[0] > -1e-30 or bits == 7):
            continue  # PyTorch wastes half of the levels on values that are never negative
        theirs = MinMaxObserver(dtype=torch.quint8, qscheme=qscheme, quant_min=0, quant_max=2**bits - 1, eps=2**-24)
        theirs(ends)
        their_scale, their_zero = theirs.calculate_qparams()
        torch.testing.assert_close(scale, their_scale.squeeze(), rtol=1e-5, atol=0)
        assert abs(int(zero) - int(their_zero)) <= 1


def test_symmetric_ranges_use_every_level_of_what_is_never_negative() -> None:
    scale, zero = scale_and_zero_point(torch.tensor(0.5), torch.tensor(2.55), SYMMETRIC)
    assert scale.item() == pytest.approx(0.01) and zero == 0
    scale, zero = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(0.5), SYMMETRIC)
    assert scale.item() == pytest.approx(2 / 255) and zero == 128


def test_minmax_and_the_moving_average_follow_their_definitions() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.0, 5.0])]
    assert minmax(seen(*batches), AFFINE) == (-3.0, 5.0)
    low, high = -1.0, 2.0
    for next_low, next_high in ((-3.0, 1.0), (0.0, 5.0)):
        low, high = (1 - MOMENTUM) * low + MOMENTUM * next_low, (1 - MOMENTUM) * high + MOMENTUM * next_high
    assert moving_average(seen(*batches), AFFINE) == pytest.approx((low, high))


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9, 100.0])
def test_percentiles_are_numpys_to_within_a_bin(bell: Tensor, share: float) -> None:
    facts = seen(bell)
    low, high = percentile(facts, QuantConfig(observer="percentile", percentile=share))
    width = (facts.high - facts.low) / BINS
    expected = np.percentile(bell.numpy(), [100 - share, share])
    assert abs(low - expected[0]) <= width and abs(high - expected[1]) <= width


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_least_squares_is_no_worse_than_any_range_of_a_grid(bell: Tensor, scheme: str) -> None:
    config = QuantConfig(quant_scheme=scheme)
    for values in (bell, bell.relu(), torch.cat([bell, torch.tensor([40.0])]), bell.exp()):
        found = error(values, *least_squares(seen(values), config), config)
        full = error(values, values.min().item(), values.max().item(), config)
        assert found <= full * 1.001
        grid = [
            error(values, a * values.min().item(), b * values.max().item(), config)
            for a in np.linspace(0.1, 1, 10)
            for b in np.linspace(0.1, 1, 10)
        ]
        assert found <= min(grid) * 1.02


def test_an_outlier_moves_the_full_range_and_the_searched_ones_less(bell: Tensor) -> None:
    values = torch.cat([bell, torch.tensor([40.0])])
    facts = seen(values)
    assert minmax(facts, AFFINE)[1] == 40
    assert percentile(facts, AFFINE)[1] < 5
    # Clipping it costs (40 - high)^2 / n, rounding the others ((high - low) / 255)^2 / 12: the least sum, in closed form.
    low, n = bell.min().item(), len(values)
    best = (40 / n + low / (12 * 255**2)) / (1 / n + 1 / (12 * 255**2))
    assert least_squares(facts, AFFINE)[1] == pytest.approx(best, rel=0.03)
    assert least_divergence(facts, AFFINE)[1] < 35


def test_least_divergence_clips_a_long_tail_and_keeps_what_has_none(bell: Tensor) -> None:
    flat = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    assert least_divergence(seen(flat), AFFINE)[1] > 0.95
    tail = bell.abs() ** 3
    assert least_divergence(seen(tail), AFFINE)[1] < 0.8 * tail.max().item()


def test_weights_have_one_scale_a_channel_or_one_in_all() -> None:
    weight = torch.tensor([[1.27, -0.5], [0.0, 0.0], [2.54, 0.1]])
    torch.testing.assert_close(weight_scale(weight, True), torch.tensor([0.01, 2.0**-24, 0.02]))
    torch.testing.assert_close(weight_scale(weight, False), torch.full((3,), 0.02))


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_rule_copes_with_values_that_never_change(name: str) -> None:
    for value in (0.0, 3.0, -2.0):
        rule = OBSERVERS.factory(name)
        low, high = rule(seen(torch.full((100,), value)), AFFINE)
        assert np.isfinite([low, high]).all()
        assert error(torch.full((4,), value), low, high) <= (abs(value) / 100) ** 2 + 1e-12
