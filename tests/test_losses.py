"""Losses against their formulas, one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.errors import ConfigError, ModelError
from workbench.losses import LOSSES, LossConfig, check_labels, check_output, make_loss

rows = st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=6)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def by_element(name: str, x: float, y: float) -> float:
    d = abs(x - y)
    return {
        "mse": d * d,
        "l1": d,
        "smooth_l1": d * d / 2 if d < 1 else d - 0.5,
        "huber": d * d / 2 if d <= 1 else d - 0.5,
        "bce_with_logits": softplus(x) - x * y,
    }[name]


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "huber", "bce_with_logits"])
@settings(max_examples=50, deadline=None)
@given(x=rows, data=st.data())
def test_a_loss_by_element_is_its_formula(name: str, x: list[list[float]], data: st.DataObject) -> None:
    unit = name == "bce_with_logits"
    y = [[data.draw(st.floats(0, 1) if unit else st.floats(-20, 20)) for _ in row] for row in x]
    expected = np.mean([by_element(name, a, b) for row, other in zip(x, y, strict=True) for a, b in zip(row, other, strict=True)])
    found = make_loss(LossConfig(name=name))(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@settings(max_examples=50, deadline=None)
@given(x=rows, data=st.data())
def test_cross_entropy_is_its_formula_label_smoothing_too(smoothing: float, x: list[list[float]], data: st.DataObject) -> None:
    labels = [data.draw(st.integers(0, 3)) for _ in x]
    expected = 0.0
    for row, label in zip(x, labels, strict=True):
        normal = max(row) + math.log(sum(math.exp(value - max(row)) for value in row))
        expected += sum(((1 - smoothing) * (k == label) + smoothing / 4) * (normal - value) for k, value in enumerate(row))
    loss = make_loss(LossConfig(name="cross_entropy", args={"label_smoothing": smoothing}))
    found = loss(torch.tensor(x, dtype=torch.float64), torch.tensor(labels))
    assert float(found) == pytest.approx(expected / len(x), rel=1e-9, abs=1e-12)
    if not smoothing:
        nll = make_loss(LossConfig(name="nll"))
        torch.testing.assert_close(nll(torch.tensor(x, dtype=torch.float64).log_softmax(1), torch.tensor(labels)), found)


def test_a_loss_is_named_or_a_callable_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="no loss named 'mes'. Did you mean 'mse'"):
        LossConfig(name="mes")
    with pytest.raises(ConfigError, match="loss 'mse' does not take these arguments.*alpha"):
        make_loss(LossConfig(name="mse", args={"alpha": 1}))
    assert isinstance(make_loss(LossConfig(name="torch.nn:KLDivLoss")), nn.KLDivLoss)
    assert len(LOSSES) >= 7


def test_an_output_that_does_not_fit_is_told_with_both_shapes() -> None:
    config = LossConfig(name="mse")
    loss = make_loss(config)
    with pytest.raises(ModelError, match=r"float32 \[2, 3\], does not fit the loss 'mse' with targets float32 \[5\]"):
        check_output(loss, torch.zeros(2, 3), torch.zeros(5), config)
    with pytest.raises(ModelError, match=r"float32 \[4, 1\], does not fit the loss 'mse' with targets float32 \[4\]"):
        check_output(loss, torch.zeros(4, 1), torch.zeros(4), config)
    with pytest.raises(ModelError, match="returns dict, but the loss 'mse' takes a tensor"):
        check_output(loss, {"logits": torch.zeros(2)}, torch.zeros(2), config)
    with pytest.raises(ModelError, match=r"gave float32 \[2\], not one number"):
        check_output(nn.MSELoss(reduction="none"), torch.zeros(2), torch.zeros(2), config)


def test_labels_that_are_to_be_ignored_are_in_range() -> None:
    check_labels(torch.tensor([0, 9, -100]), 10, LossConfig())
    check_labels(torch.tensor([0, 255]), 10, LossConfig(args={"ignore_index": 255}))
    for wrong in (-1, 10):
        with pytest.raises(ModelError, match=f"10 outputs, but the data has the label {wrong}"):
            check_labels(torch.tensor([0, wrong]), 10, LossConfig())
