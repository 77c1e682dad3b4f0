"""The same training however it is split: over two processes, micro-steps, places where samples wait."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workbench import Run, TrainConfig, events, launch, launcher, train
from workbench.data.batches import Batches, Target
from workbench.data.order import Shard, derive_seed
from workbench.data.splits import load_splits
from workbench.models import build_model
from workbench.training.subject import fit_to_data

pytestmark = pytest.mark.usefixtures("forked")

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
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], until: Callable[..., Any], tmp_path: Path
) -> None:
    name = config().model.name.replace(":net", ":normed")
    whole = launch(config(model__name=name, epochs=2, checkpoint__every_steps=5), nproc=2, root=tmp_path).wait(timeout=120)
    until(lambda: launcher.at_work(whole.path) is None)  # its ranks part after the last word
    shutil.copytree(whole.path, tmp_path / "again")
    again = Run.open(tmp_path / "again")
    shutil.rmtree(again.checkpoints[-1])  # back to the one before, of step 15
    assert again.checkpoints[-1].name == "step-15"
    launcher.spawn(again.path, 2)
    again.wait(timeout=120)
    assert again.history["step"].tolist() == list(range(1, 17))
    assert_same(again, whole)


def test_a_run_whose_first_rank_is_killed_goes_on_with_one(
    split: Callable[..., TrainConfig], alone: Run, assert_whole: Callable[[Run], None], until: Callable[..., Any], tmp_path: Path
) -> None:
    """On one process instead of two, from the last checkpoint; the losses are those of one."""
    slow = split(**{"checkpoint.every_steps": 2, "model.args": {"dropout": 0.0, "pause": 0.1}})
    run = launch(slow, nproc=2, root=tmp_path)
    until(lambda: len(run.checkpoints) and run.progress.step > 4)
    heartbeat = launcher.Heartbeat.read(run.path)
    assert heartbeat is not None
    os.kill(heartbeat.process.pid, signal.SIGKILL)
    until(lambda: run.status == "failed")
    assert "Rank 0" in (run.error or "") and "SIGKILL" in (run.error or "")
    assert_whole(run)
    run.resume(nproc=1).wait(timeout=120)
    assert_whole(run)
    assert furthest(alone, run) < TOLERANCE


def test_readings_of_the_first_step_are_those_of_a_float64_model(alone: Run, two_ranks: Run) -> None:
    """The same model, batch and loss in float64, with hooks by hand; on one rank and on two."""
    config = alone.config
    splits = load_splits(config.data)
    torch.manual_seed(derive_seed(config.seed))
    model = build_model(fit_to_data(config, splits)).double().train()
    batches = Batches(splits, config.data, Shard(), Target(torch.device("cpu")), config.seed)
    ((x, y),) = next(iter(batches.epoch(0)))
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, a, output, name=name: outputs.__setitem__(name, output.detach().clone()))
    loss = nn.functional.cross_entropy(model(x.double()), y)
    loss.backward()
    for run in (alone, two_ranks):
        assert run.history["loss"].iloc[0] == pytest.approx(float(loss.detach()), rel=1e-6)
        gradients = run.readings("gradients")
        first = gradients[gradients["step"] == 1]
        for name, parameter in model.named_parameters():
            norms = first.loc[first["layer"] == name, "norm"].tolist()
            assert norms == pytest.approx([float(parameter.grad.norm())] * run_size(run), rel=1e-4)  # type: ignore[union-attr]
        activations = run.readings("activations")
        first = activations[activations["step"] == 1]
        for layer, rows in first.groupby("layer"):
            for row in rows.itertuples():
                half = 32 // run_size(run)
                value = outputs[str(layer)][row.rank * half : (row.rank + 1) * half]
                spread = float(value.std(correction=0))
                for name, reference in (
                    ("mean", value.mean()),
                    ("std", value.std(correction=0)),
                    ("min", value.min()),
                    ("max", value.max()),
                ):
                    assert abs(getattr(row, name) - float(reference)) < 1e-4 * spread, (layer, name)


def run_size(run: Run) -> int:
    return int(next(event.world_size for event in run.events if isinstance(event, events.AttemptStarted)))


@pytest.mark.slow
def test_two_compiled_ranks_have_the_losses_of_one_and_tell_what_they_wait_for(
    alone: Run, split: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Their gradients are exchanged within the compiled pass; checkpoints and readings are those of any run."""
    probes = {f"probes.{name}.every": 1 for name in ("communication", "gradients")}
    run = launch(split(compile="default", **probes), nproc=2, root=tmp_path).wait(timeout=240)
    difference = furthest(alone, run)
    print(f"two compiled ranks against one: {difference:.1e}")
    assert difference < TOLERANCE and furthest(alone, run, "val_loss") < TOLERANCE
    timed = run.readings("communication").dropna(subset=["exposed"])
    assert set(timed["rank"]) == {0, 1} and len(timed) > len(run.history)
    assert (timed["busy"] > 0).all() and (timed["exposed"] >= 0).all() and (timed["exposed"] < 60).all()
    norms = run.readings("gradients").pivot_table(index=["step", "layer"], columns="rank", values="norm")
    np.testing.assert_array_equal(norms[0], norms[1])


def test_a_compiled_run_has_the_losses_and_readings_of_the_eager_one(alone: Run, split: Callable[..., TrainConfig]) -> None:
    compiled = train(split(compile="default")).run
    difference = furthest(alone, compiled)
    print(f"compiled against eager: {difference:.1e}")
    assert difference < 1e-4
    for kind in ("gradients", "activations"):
        one, two = alone.readings(kind), compiled.readings(kind)
        assert one["step"].tolist() == two["step"].tolist() and one["layer"].tolist() == two["layer"].tolist()
        for column in ("norm", "weight_norm") if kind == "gradients" else ("std", "max"):
            np.testing.assert_allclose(two[column], one[column], rtol=5e-3, atol=1e-5)


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
