"""Samples held out of training for choices: stratified, by seed, the test samples unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from workbench import TrainConfig, train
from workbench.data import load_batches
from workbench.data.config import DataConfig
from workbench.data.splits import Arrays, Splits, hold_out, load_splits
from workbench.errors import ConfigError


def numbered(labels: torch.Tensor) -> Splits:
    x = torch.arange(len(labels)).float()[:, None]
    return Splits(Arrays(x, labels), Arrays(-1 - x, labels))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.integers(1, 9), st.integers(0, 3))
def test_each_sample_is_trained_on_or_held_out_and_each_class_gives_its_part(sizes: list[int], tenths: int, seed: int) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    splits, amount = numbered(labels[torch.randperm(len(labels))]), tenths / 10
    wanted = round(amount * len(labels))
    if not 0 < wanted < len(labels):
        with pytest.raises(ConfigError, match="data.holdout="):
            hold_out(splits, amount, seed)
        return
    found: Any = hold_out(splits, amount, seed)
    assert len(found.eval) == wanted
    assert sorted(torch.cat([found.train.x, found.eval.x])[:, 0].tolist()) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        assert abs(int((found.eval.y == label).sum()) - size * wanted / len(labels)) <= 1
    assert torch.equal(hold_out(splits, amount, seed).eval.x, found.eval.x)  # type: ignore[union-attr]


def test_the_seed_decides_which_and_a_number_how_many() -> None:
    held: list[Any] = [
        load_splits(DataConfig(name="digits", holdout=200, holdout_seed=seed)).eval.x  # type: ignore[union-attr]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(held[0], held[1]) and not torch.equal(held[0], held[2])
    assert all(len(x) == 200 for x in held)


def test_test_samples_are_not_seen_and_a_limit_counts_what_is_left() -> None:
    whole: Any = load_splits(DataConfig(name="digits"))
    found: Any = load_splits(DataConfig(name="digits", holdout=0.2, limit=100))
    rows = {sample.numpy().tobytes() for sample in whole.train.x}
    assert len(found.train) == 100 and len(found.eval) == round(0.2 * len(whole.train))
    assert all(sample.numpy().tobytes() in rows for part in (found.train, found.eval) for sample in part.x)
    unlimited: Any = load_splits(DataConfig(name="digits", holdout=0.2))
    assert torch.equal(unlimited.eval.x, found.eval.x) and torch.equal(unlimited.train.x[:100], found.train.x)


class Pairs(Dataset[Any]):
    def __init__(self, targets: Any = None) -> None:
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index % 4


@pytest.mark.parametrize("targets", [None, [index % 4 for index in range(40)], [{"box": 1}] * 40])
def test_data_sets_give_some_of_their_samples(targets: Any) -> None:
    found: Any = hold_out(Splits(Pairs(targets), Pairs()), 0.3)
    held, kept = ({int(x) for x, _ in part} for part in (found.eval, found.train))
    assert len(held) == 12 and not held & kept and held | kept == set(range(40))
    if targets is not None and isinstance(targets[0], int):
        assert [sum(number % 4 == label for number in held) for label in range(4)] == [3, 3, 3, 3]


@pytest.mark.parametrize("holdout", [0.0001, 1437, 0.9999])
def test_what_holds_out_no_or_every_sample_is_refused(holdout: float) -> None:
    with pytest.raises(ConfigError, match="holdout"):
        load_splits(DataConfig(name="digits", holdout=holdout))


def test_a_run_is_evaluated_on_what_is_held_out() -> None:
    config = TrainConfig(
        data={"name": "digits", "holdout": 0.25, "batch_size": 64, "limit": 512},
        model={"name": "mlp", "args": {"widths": [16]}},
        epochs=1,
        device="cpu",
    )
    result = train(config)
    (x, y), *_ = load_batches(config.data)
    assert len(y) == round(0.25 * 1437)
    with torch.no_grad():
        accuracy = (result.model(x).argmax(1) == y).double().mean()
    assert result.metrics["accuracy"] == pytest.approx(float(accuracy))


def test_images_are_scaled_when_loaded() -> None:
    own: Any = load_splits(DataConfig(name="digits", limit=50))
    found: Any = load_splits(DataConfig(name="digits", limit=50, resize=20))
    assert found.sample_shape == (1, 20, 20) and found.eval.x.shape[1:] == (1, 20, 20) and found.train.x.dtype == torch.uint8
    assert torch.equal(found.train.y, own.train.y)
    expected = torch.nn.functional.interpolate(own.train.x.double(), (20, 20), mode="bilinear", antialias=True)
    assert (found.train.x - expected).abs().max() <= 1  # a level of 255, as images are stored
    config = TrainConfig(data={"name": "digits", "limit": 64, "batch_size": 32, "resize": 16}, epochs=1, device="cpu")
    assert load_batches(config.data, "train")[0][0].shape == (32, 1, 16, 16)
    with pytest.raises(ConfigError, match=r"data.resize=8 .* transform"):
        load_splits(DataConfig(name="digits", resize=8), numbered(torch.arange(8) % 2))
