"""The same training however it is split: over two processes, micro-steps, places where samples wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import Run, TrainConfig, launch, train

TOLERANCE = 1e-5
"""Of losses near 2: gradients are summed in another order, so that about the last two of fp32's seven digits differ."""


@pytest.fixture(scope="module")
def split(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """A config without dropout, whose numbers every rank draws for itself."""

    def make(**changes: object) -> TrainConfig:
        return config(**({"model.args": {"dropout": 0.0}, "epochs": 3} | changes))

    return make


@pytest.fixture(scope="module")
def alone(split: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(split(), root=tmp_path_factory.mktemp("alone")).run


@pytest.fixture(scope="module")
def two_ranks(split: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return launch(split(), nproc=2, root=tmp_path_factory.mktemp("two")).wait(timeout=120)


def furthest(one: Run, other: Run, column: str = "loss") -> float:
    assert one.history["step"].tolist() == other.history["step"].tolist()
    return float(np.nanmax(np.abs(one.history[column] - other.history[column])))


def test_two_ranks_have_the_losses_of_one(alone: Run, two_ranks: Run) -> None:
    difference = furthest(alone, two_ranks)
    print(f"largest difference of {len(alone.history)} losses: {difference:.2e}")
    assert difference < TOLERANCE
    assert furthest(alone, two_ranks, "lr") == 0
    assert furthest(alone, two_ranks, "val_loss") < TOLERANCE
    assert two_ranks.metrics["accuracy"] == pytest.approx(alone.metrics["accuracy"], abs=0.003)  # one of 360 samples


def test_two_ranks_of_two_micro_steps_have_the_losses_of_one(
    alone: Run, split: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = launch(split(accumulate=2), nproc=2, root=tmp_path).wait(timeout=120)
    assert furthest(alone, run) < TOLERANCE


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_steps_have_the_losses_of_one_batch(
    accumulate: int, alone: Run, split: Callable[..., TrainConfig]
) -> None:
    run = train(split(accumulate=accumulate)).run
    difference = furthest(alone, run)
    print(f"accumulate={accumulate}: {difference:.2e}")
    assert difference < TOLERANCE


def test_batch_normalization_makes_ranks_differ_and_micro_steps_too(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Statistics are of a rank's own samples: the losses differ, but the runs learn alike."""
    name = config().model.name.replace(":net", ":normed")
    normed = config(model__name=name, epochs=3)
    one = train(normed).run
    two = launch(normed, nproc=2, root=tmp_path).wait(timeout=120)
    difference = furthest(one, two)
    print(f"with batch normalization: {difference:.2e}")
    assert TOLERANCE < difference < 0.3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_of_the_device(
    workers: int, config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    """Dropout is on: a loader must not draw from the generator that the model draws from."""
    held = train(config(epochs=2), root=tmp_path).run
    read = train(config(epochs=2, data__placement="loader", data__workers=workers), root=tmp_path).run
    assert_same(held, read)


def test_a_run_with_a_loader_resumes_within_an_epoch_bit_for_bit(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    loaded = config(epochs=3, data__placement="loader", data__workers=1)
    whole = train(loaded, root=tmp_path).run
    stopped = train(loaded, root=tmp_path, replay=[(11, "stop", {})]).run
    assert stopped.status == "stopped" and stopped.progress.step == 11
    assert_same(stopped.resume().wait(timeout=120), whole)


def test_a_run_on_two_ranks_resumes_bit_for_bit_with_batch_normalization(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    name = config().model.name.replace(":net", ":normed")
    normed = config(model__name=name, epochs=2, checkpoint__every_steps=5)
    whole = launch(normed, nproc=2, root=tmp_path)
    again = launch(normed, nproc=2, root=tmp_path)
    whole.wait(timeout=120)
    again.wait(timeout=120)
    assert_same(again, whole)
    # Go back to the checkpoint of step 10 or 15 by taking the last one, and what followed it, away.
    for extra in again.checkpoints[1:]:
        extra.rename(tmp_path / extra.name)
    start = int(again.checkpoints[-1].name.removeprefix("step-"))
    assert start == 15
    from workbench import launcher

    launcher.spawn(again.path, 2)
    again.wait(timeout=120)
    assert Run.open(again.path).history["step"].tolist() == list(range(1, 17))
    assert_same(Run.open(again.path), whole)


def test_a_run_of_two_ranks_goes_on_with_one(
    config: Callable[..., TrainConfig], assert_whole: Callable[[Run], None], tmp_path: Path
) -> None:
    pass


def test_readings_of_two_ranks_merge_to_those_of_one(alone: Run, two_ranks: Run) -> None:
    """Gradients are of the whole batch on every rank; activations are of each rank's half, and add up."""
    one, two = alone.readings("gradients"), two_ranks.readings("gradients")
    assert sorted(two["rank"].unique()) == [0, 1]
    for rank in (0, 1):
        mine = two[two["rank"] == rank].reset_index(drop=True)
        assert mine["layer"].tolist() == one["layer"].tolist() and mine["step"].tolist() == one["step"].tolist()
        np.testing.assert_allclose(mine["norm"], one["norm"], rtol=2e-4)
        np.testing.assert_allclose(mine["weight_norm"], one["weight_norm"], rtol=2e-4)
    one, two = alone.readings("activations"), two_ranks.readings("activations")
    halves = [two[two["rank"] == rank].set_index(["step", "layer"]) for rank in (0, 1)]
    whole = one.set_index(["step", "layer"])
    halves = [half.loc[whole.index] for half in halves]
    assert (halves[0]["count"] + halves[1]["count"] == whole["count"]).all()
    mean = (halves[0]["mean"] * halves[0]["count"] + halves[1]["mean"] * halves[1]["count"]) / whole["count"]
    np.testing.assert_allclose(mean, whole["mean"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.minimum(halves[0]["min"], halves[1]["min"]), whole["min"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.maximum(halves[0]["max"], halves[1]["max"]), whole["max"], rtol=1e-3, atol=1e-5)
