"""Mixed samples and targets: the definition, the same however a batch is split, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import TrainConfig, train
from workbench.data.augment import Draw
from workbench.data.batches import Batches, Target
from workbench.data.config import DataConfig
from workbench.data.mix import cutmix, mix_targets, mixup
from workbench.data.order import Shard
from workbench.data.splits import Arrays, Splits, load_splits
from workbench.errors import ConfigError, ModelError

MIXES = ("mixup", "cutmix")


def made(config: DataConfig, shard: Shard, splits: Splits, **target: Any) -> Batches:
    return Batches(splits, config, shard, Target(torch.device("cpu"), **target), 5)


def read(config: DataConfig, splits: Splits, shard: Shard = Shard()) -> list[list[tuple[Tensor, Tensor]]]:  # noqa: B008
    return [list(step) for step in made(config, shard, splits).epoch(1)]


def draw(total: int) -> Draw:
    return Draw(torch.Generator().manual_seed(0), total, slice(0, total))


def test_mixup_blends_samples_and_targets_by_the_same_share() -> None:
    x, partner = torch.randn(64, 3, 4, 5), torch.randn(64, 3, 4, 5)
    mixed, share = mixup(x, partner, draw(64), alpha=0.4)
    factor = share[:, None, None, None]
    torch.testing.assert_close(mixed, factor * x + (1 - factor) * partner)
    y, other = torch.randint(7, (64,)), torch.randint(7, (64,))
    target = mix_targets(y, other, share, 7)
    torch.testing.assert_close(target.sum(1), torch.ones(64))
    expected = share * (target.new_zeros(64, 7).scatter(1, y[:, None], 1.0)[torch.arange(64), y])
    assert (target[torch.arange(64), y] >= expected - 1e-6).all()
    # The cross-entropy of the blend is the blend of the cross-entropies.
    logits = torch.randn(64, 7)
    loss = torch.nn.functional.cross_entropy
    by_parts = (share * loss(logits, y, reduction="none") + (1 - share) * loss(logits, other, reduction="none")).mean()
    torch.testing.assert_close(loss(logits, target), by_parts)


def test_cutmix_pastes_a_box_whose_area_is_the_partners_share() -> None:
    x, partner = torch.zeros(500, 2, 16, 12), torch.ones(500, 2, 16, 12)
    mixed, share = cutmix(x, partner, draw(500), alpha=1.0)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), 1 - share)
    for sample in mixed[:, 0]:
        rows, columns = torch.where(sample == 1)
        if len(rows):  # it is one whole rectangle
            assert sample[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].eq(1).all()
    assert 0.3 < float(share.mean()) < 0.75 and float(share.std()) > 0.1


@pytest.mark.parametrize("placement", ["device", "loader"])
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batches_are_the_same_over_ranks_and_micro_steps(mix: Any, placement: Any) -> None:
    splits = load_splits(DataConfig(name="digits", limit=64))
    config = DataConfig(batch_size=16, augment=("shift", "flip", "cutout"), mix=mix, placement=placement, workers=0)
    whole = [step[0] for step in read(config, splits)]
    assert len(whole) == 4 and whole[0][1].shape == (16, 10)
    for world, micro in ((2, 1), (1, 4), (4, 2)):
        parts = [read(config, splits, Shard(rank, world, micro)) for rank in range(world)]
        for step, (x, y) in enumerate(whole):
            assert torch.equal(torch.cat([part[0] for rank in parts for part in rank[step]]), x)
            assert torch.equal(torch.cat([part[1] for rank in parts for part in rank[step]]), y)


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_sample_is_made_of_the_augmented_one_and_its_mirror_in_the_batch(mix: Any) -> None:
    splits = load_splits(DataConfig(name="digits", limit=64))
    config = DataConfig(batch_size=16, augment=("shift", "flip"))
    (x, y), *_ = (step[0] for step in read(config, splits))
    (mixed, target), *_ = (step[0] for step in read(config.override({"mix": mix}), splits))
    partner = x.flip(0)
    assert ((mixed >= torch.minimum(x, partner) - 1e-6) & (mixed <= torch.maximum(x, partner) + 1e-6)).all()
    share = target[torch.arange(16), y]
    different = y != y.flip(0)
    torch.testing.assert_close(target[torch.arange(16), y.flip(0)][different], 1 - share[different])


@pytest.mark.parametrize("mix", MIXES)
def test_mixing_keeps_type_and_layout_of_the_images(mix: Any) -> None:
    splits = load_splits(DataConfig(name="digits", limit=32))
    for shard in (Shard(), Shard(0, 2, 1)):
        batches = made(DataConfig(batch_size=16, mix=mix), shard, splits, dtype=torch.bfloat16, channels_last=True)
        (x, y) = next(iter(next(iter(batches.epoch(0)))))
        assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.float32


def test_numbers_are_mixed_with_their_targets() -> None:
    x, y = torch.randn(32, 5), torch.randn(32)
    splits = Splits(Arrays(x, y), Arrays(x, y))
    ((mixed, target),) = read(DataConfig(batch_size=32, mix="mixup"), splits)[0]
    order = made(DataConfig(batch_size=32), Shard(), splits).order(1)
    a, b = x[order], x[order].flip(0)
    share = ((mixed - b) / (a - b)).mean(1)
    torch.testing.assert_close(target, share * y[order] + (1 - share) * y[order].flip(0), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_mixed_is_refused() -> None:
    ids = torch.randint(9, (32, 6))
    with pytest.raises(ConfigError, match="mix='mixup' cannot mix samples of int64"):
        read(DataConfig(batch_size=8, mix="mixup"), Splits(Arrays(ids, ids[:, 0]), Arrays(ids, ids[:, 0])))
    rows = torch.randn(32, 6)
    with pytest.raises(ConfigError, match=r"'cutmix' pastes images; samples here are \[6\].*mixup"):
        read(DataConfig(batch_size=8, mix="cutmix"), Splits(Arrays(rows, ids[:, 0]), Arrays(rows, ids[:, 0])))


def test_a_run_learns_from_mixed_samples_and_is_evaluated_on_whole_ones() -> None:
    config = TrainConfig(
        data={"name": "digits", "batch_size": 64, "mix": "mixup", "mix_alpha": 0.2},
        model={"name": "mlp", "args": {"widths": [64]}},
        optim={"lr": 5e-3},
        epochs=6,
        device="cpu",
    )
    metrics = train(config).metrics
    assert metrics["accuracy"] > 0.9
    with pytest.raises(ModelError, match="does not fit the loss 'nll' with targets float32"):
        train(config.override({"loss.name": "nll"}))


def test_a_run_on_mixed_samples_resumes_bit_for_bit(tmp_path: Any) -> None:
    config = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 32, "mix": "cutmix"},
        model={"name": "mlp", "args": {"widths": [16]}},
        epochs=2,
        device="cpu",
    )
    whole = train(config, root=tmp_path).run
    stopped: Callable[..., Any] = train(config, root=tmp_path, replay=[(5, "stop", {})]).run.resume
    assert stopped().wait(timeout=120).history["loss"].equals(whole.history["loss"])
