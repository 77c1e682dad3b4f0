"""Unequal shares: the same global batch and gradient however it is shared out, and shares that follow speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench import Run, TrainConfig, launch, train
from workbench.data.batches import Batches, Target
from workbench.data.config import DataConfig
from workbench.data.order import Shard
from workbench.data.splits import load_splits
from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.training.balance import SETTING, apportion, first_shares
from workbench.training.decisions import Decisions

pytestmark = pytest.mark.usefixtures("forked")

TOLERANCE = 1e-5
"""Of losses near 2: gradients are summed in another order."""

SPLITS = load_splits(DataConfig(name="digits", limit=96))


@settings(max_examples=60)
@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=3), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_no_other_shares_let_the_slowest_rank_end_earlier(speeds: list[float], units: int, grain: int) -> None:
    units += len(speeds)
    shares = apportion(units * grain, speeds, grain)
    assert sum(shares) == units * grain and all(share >= grain and share % grain == 0 for share in shares)

    def end(counts: tuple[int, ...]) -> float:
        return max(count / speed for count, speed in zip(counts, speeds, strict=True))

    others = itertools.product(range(1, units + 1), repeat=len(speeds))
    best = min(end(counts) for counts in others if sum(counts) == units)
    assert end(shares) == pytest.approx(best * grain)


def read(batches: Batches, epoch: int, change: tuple[int, tuple[int, ...]] | None = None) -> list[list[tuple[Tensor, Tensor]]]:
    """Micro-batches by step; other shares from a step on, told as early as must be."""
    steps = []
    for step, micro_batches in enumerate(batches.epoch(epoch)):
        at = epoch * batches.steps_per_epoch + step
        steps.append(list(micro_batches))
        if change is not None and at + 1 + batches.ahead == change[0]:
            batches.share_out(change[1], change[0])
    return steps


@settings(max_examples=25)
@given(
    st.integers(1, 4).flatmap(lambda world: st.tuples(*[st.integers(1, 6)] * world)),
    st.sampled_from([1, 2]),
    st.sampled_from(["device", "loader"]),
    st.sampled_from(["off", "mixup"]),
)
def test_unequal_ranks_share_out_the_global_batch_of_one(weights: tuple[int, ...], micro: int, placement: Any, mix: Any) -> None:
    """Samples and what is drawn for them; the shares change in the middle of an epoch."""
    world = len(weights)
    config = DataConfig(batch_size=16, augment=("shift", "cutout"), mix=mix, placement=placement, workers=0)

    def made(shard: Shard) -> Batches:
        return Batches(SPLITS, config, shard, Target(torch.device("cpu")), 3)

    before, after = (apportion(16, speeds, micro) for speeds in (weights, weights[::-1]))
    whole = read(made(Shard()), 1)
    ranks = [made(Shard(rank, world, micro, before)) for rank in range(world)]
    parts = [read(batches, 1, change=(9, after)) for batches in ranks]
    for step, ((x, y),) in enumerate(whole):
        shared = [part for rank in parts for part in rank[step]]
        assert torch.equal(torch.cat([part for part, _ in shared]), x)
        assert torch.equal(torch.cat([part for _, part in shared]), y)
        for rank, batches in enumerate(ranks):
            assert len(parts[rank][step][0][1]) * micro == (before if step < 3 else after)[rank]
            # weighted means add up to the mean of all
            assert 1 / batches.parts(6 + step) == pytest.approx(len(parts[rank][step][0][1]) * world / 16)
    held_out = sorted(int(y[i]) for batches in ranks for _, y, count in batches.evaluation() for i in range(count))
    assert held_out == sorted(SPLITS.eval.y.tolist())  # type: ignore[union-attr]


def test_loader_processes_read_ahead_no_further_than_shares_are_told() -> None:
    config = DataConfig(batch_size=4, augment=(), placement="loader", workers=1)
    ranks = [Batches(SPLITS, config, Shard(rank, 2), Target(torch.device("cpu")), 3) for rank in (0, 1)]
    try:
        assert ranks[0].ahead == 5
        parts = [read(batches, 0, change=(11, (1, 3))) for batches in ranks]
    finally:
        for batches in ranks:
            batches.close()
    assert [[len(y) for ((_, y),) in rank] for rank in parts] == [[2] * 11 + [1] * 13, [2] * 11 + [3] * 13]


@pytest.fixture(scope="module")
def given_config(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        base = {"model.args": {"dropout": 0.0}, "epochs": 2, "ema": 0.9, "penalties": {"l1": 1e-4}, "data.mix": "mixup"}
        return config(**(base | changes))

    return make


def furthest(one: Run, other: Run, column: str = "loss") -> float:
    assert one.history["step"].tolist() == other.history["step"].tolist()
    return float(np.nanmax(np.abs(one.history[column] - other.history[column])))


def test_unequal_shares_have_the_losses_and_gradients_of_one_process(
    given_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Of micro-steps and a loader too; the loss told is the mean over all samples of the global batch."""
    alone = train(given_config(), root=tmp_path).run
    unequal = given_config(**{"balance.shares": (1, 7), "accumulate": 2, "data.placement": "loader", "data.workers": 1})
    run = launch(unequal, nproc=2, root=tmp_path).wait(timeout=120)
    print(f"largest difference of {len(alone.history)} losses: {furthest(alone, run):.1e}")
    assert furthest(alone, run) < TOLERANCE
    assert furthest(alone, run, "val_loss") < TOLERANCE
    expected = alone.readings("gradients")["norm"]
    gradients = run.readings("gradients")
    for rank in (0, 1):
        np.testing.assert_allclose(gradients[gradients["rank"] == rank]["norm"], expected, rtol=2e-4, atol=1e-7)
    counts = run.readings("activations")
    counts = counts[(counts["layer"] == counts["layer"].iloc[-1]) & (counts["step"] == 1)].set_index("rank")["count"]
    assert counts[1] == 7 * counts[0]


def test_shares_follow_speed_and_a_resumed_run_begins_with_them(given_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Rank 1 computes everything eight times: what else the machine does must not hide it."""
    name = given_config().model.name.replace(":net", ":slowed_net")
    changes = {"model.name": name, "model.args": {"rank": 1, "times": 8}, "epochs": 6, "data.augment": (), "data.mix": "off"}
    base = given_config(**changes, **{"checkpoint.every_epochs": 0, "log_every": 10})
    alone = train(base, root=tmp_path).run
    speed = base.override({"balance.shares": "speed", "balance.every": 8})
    run = launch(speed, nproc=2, root=tmp_path, replay=[(32, "stop", {})]).wait(timeout=120)
    sizes = run.resolved[SETTING]["value"]
    print(f"shares {sizes}")
    assert sum(sizes) == 32 and sizes[0] > sizes[1]
    found = [finding for finding in run.findings if finding.name == "shares"]
    assert found and found[-1].message == run.resolved[SETTING]["reason"]
    assert f"{sizes[0]} : {sizes[1]}" in found[-1].message
    run.resume().wait(timeout=120)
    assert furthest(alone, run) < TOLERANCE
    times = run.readings("communication")
    known = times[times["busy"].notna()].set_index(["step", "rank"])
    assert known.index.get_level_values("rank").nunique() == 2
    assert 1 not in times.loc[times["busy"].notna(), "step"].tolist()  # the first step follows no other
    assert (known["exposed"] >= 0).all() and (known["waited"] <= known["busy"]).all()
    parameters = sum(value.numel() for value in run.load_model().parameters())
    assert set(known["payload"]) == {4 * parameters} and set(times["link"]) == {"memory of one host"}
    assert (times["bandwidth"] > 1e6).all() and times["network"].isna().all()
    counts = run.readings("activations")
    after = counts[(counts["step"] == 36) & (counts["layer"] == counts["layer"].iloc[-1])].set_index("rank")["count"]
    assert after[0] * sizes[1] == after[1] * sizes[0]


def refused(**changes: Any) -> str:
    config = TrainConfig(data={"batch_size": 32}).override(changes)
    world = World(0, 4)
    with pytest.raises(ConfigError) as told:
        first_shares(config, config.mesh.arranged(4), world, config.compile, Decisions())
    return str(told.value)


def test_shares_that_cannot_be_are_refused_in_words() -> None:
    assert "mesh.shard=2 splits one" in refused(**{"balance.shares": "speed", "mesh.shard": 2})
    assert "names 2 rank(s), and there are 4" in refused(**{"balance.shares": (1, 2)})
    assert "captures graphs of one shape" in refused(**{"balance.shares": "speed", "compile": "reduce-overhead"})
    assert "repeats a run bit for bit" in refused(**{"balance.shares": "speed", "deterministic": True})
    assert "in multiples of accumulate=3" in refused(**{"balance.shares": "speed", "accumulate": 3})
    with pytest.raises(ConfigError, match=r"Shares of \(3, 5\) samples"):
        Batches(SPLITS, DataConfig(batch_size=8), Shard(0, 2, 2, (3, 5)), Target(torch.device("cpu")), 0)


def test_shares_decided_before_count_only_where_they_fit() -> None:
    config = TrainConfig(data={"batch_size": 32}, balance={"shares": "speed"}, accumulate=2)

    def first(ranks: int, known: list[int]) -> tuple[int, ...]:
        decided = Decisions({SETTING: {"value": known, "reason": ""}})
        return first_shares(config, config.mesh.arranged(ranks), World(0, ranks), "off", decided)

    assert first(2, [24, 8]) == (24, 8)
    assert first(3, [24, 8]) == (12, 10, 10)
    assert first(2, [25, 7]) == (16, 16)
