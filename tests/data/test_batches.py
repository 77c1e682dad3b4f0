"""Batches: each epoch every sample once, the same global batch however it is shared out, from any step on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.data.augment import Draw, crop, cutout, flip, shift
from workbench.data.batches import Batches, Target
from workbench.data.config import DataConfig
from workbench.data.order import Shard, derive_seed
from workbench.data.splits import Arrays, Splits, as_splits, load_splits
from workbench.errors import ConfigError, DataError

CPU = Target(torch.device("cpu"))


def numbered(count: int = 48, size: int = 4) -> Splits:
    """Images whose pixels are their own number."""
    x = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size).contiguous()
    return Splits(Arrays(x, torch.arange(count)), Arrays(x[:7], torch.arange(7)), mean=(0.1,), std=(0.5,))


def made(config: DataConfig, shard: Shard, splits: Splits | None = None, seed: int = 5) -> Batches:
    return Batches(splits or numbered(), config, shard, CPU, seed)


def labels(batches: Batches, epoch: int, start: int = 0) -> list[list[list[int]]]:
    """Labels by step and micro-step."""
    return [[y.tolist() for _, y in step] for step in batches.epoch(epoch, start)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]), st.integers(0, 3), st.sampled_from(["device", "loader"]))
def test_ranks_and_micro_steps_share_out_the_same_global_batch(world: int, micro: int, epoch: int, placement: Any) -> None:
    config = DataConfig(batch_size=24, placement=placement, workers=0)
    whole = [step[0] for step in labels(made(config, Shard()), epoch)]
    shared = [labels(made(config, Shard(rank, world, micro)), epoch) for rank in range(world)]
    for step, expected in enumerate(whole):
        assert [label for rank in shared for part in rank[step] for label in part] == expected
    assert sorted(label for step in whole for label in step) == list(range(48))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(0, 4), st.sampled_from(["device", "loader"]))
def test_an_epoch_goes_on_from_any_step(epoch: int, start: int, placement: Any) -> None:
    batches = made(DataConfig(batch_size=12, placement=placement, workers=0), Shard())
    assert labels(batches, epoch)[start:] == labels(batches, epoch, start)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    batches = made(DataConfig(batch_size=12), Shard())
    orders = {tuple(batches.order(epoch).tolist()) for epoch in range(20)}
    assert len(orders) == 20
    assert not torch.equal(made(DataConfig(batch_size=12), Shard(), seed=6).order(0), batches.order(0))


def test_every_sample_is_drawn_as_often_in_every_place() -> None:
    """Chi-square over 2,000 epochs of 8 samples."""
    batches = made(DataConfig(batch_size=4), Shard(), numbered(8))
    counts = np.zeros((8, 8))
    for epoch in range(2000):
        counts[np.arange(8), batches.order(epoch).numpy()] += 1
    statistic = ((counts - 250) ** 2 / 250).sum()
    assert statistic < 49 + 5 * (2 * 49) ** 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_images_as_the_device_augmented(workers: int) -> None:
    splits = load_splits(DataConfig(name="digits", limit=64))
    images = {}
    for placement in ("device", "loader"):
        config = DataConfig(batch_size=16, augment=("shift", "flip", "cutout"), placement=placement, workers=workers)  # type: ignore[arg-type]
        batches = made(config, Shard(0, 2, 2), splits)
        images[placement] = [x for step in batches.epoch(1) for x, _ in step]
        batches.close()
    assert len(images["device"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(images["device"], images["loader"], strict=True))


def test_augmented_images_are_the_same_over_ranks_and_micro_steps() -> None:
    splits = load_splits(DataConfig(name="digits", limit=64))
    config = DataConfig(batch_size=16, augment=("shift", "flip", "cutout"))
    whole = [x for step in made(config, Shard(), splits).epoch(2) for x, _ in step]
    for world, micro in ((2, 1), (1, 4), (4, 2)):
        parts = [
            [[x for x, _ in step] for step in made(config, Shard(rank, world, micro), splits).epoch(2)] for rank in range(world)
        ]
        for step, expected in enumerate(whole):
            assert torch.equal(torch.cat([x for rank in parts for x in rank[step]]), expected)


def test_pixels_become_mean_zero_and_deviation_one() -> None:
    splits = load_splits(DataConfig(name="digits"))
    (x, _), *_ = [batch for step in made(DataConfig(batch_size=1437), Shard(), splits).epoch(0) for batch in step]
    assert x.dtype == torch.float32
    assert float(x.mean()) == pytest.approx(0, abs=2e-3) and float(x.std()) == pytest.approx(1, abs=2e-3)
    raw = splits.train.x[made(DataConfig(batch_size=1437), Shard(), splits).order(0)].double() / 255  # type: ignore[union-attr]
    torch.testing.assert_close(x.double(), (raw - splits.mean[0]) / splits.std[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_come_in_the_type_and_layout_of_their_target(dtype: torch.dtype) -> None:
    x = torch.randint(0, 255, (16, 3, 6, 6), dtype=torch.uint8)
    splits = Splits(Arrays(x, torch.zeros(16, dtype=torch.int64)), Arrays(x, torch.zeros(16, dtype=torch.int64)))
    batches = Batches(splits, DataConfig(batch_size=8), Shard(), Target(torch.device("cpu"), dtype, channels_last=True), 0)
    found, _ = next(iter(next(iter(batches.epoch(0)))))
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4))
def test_evaluation_counts_every_sample_once_over_the_ranks(size: int, world: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        batches = made(DataConfig(batch_size=world * 2, eval_batch_size=size), Shard(rank, world))
        shapes = set()
        for x, y, count in batches.evaluation():
            seen += y[:count].tolist()
            shapes.add(tuple(x.shape))
        assert len(shapes) == 1  # compiled models see one shape
    assert sorted(seen) == list(range(7))


def test_random_transforms_of_a_users_data_set_draw_the_same_in_any_process() -> None:
    class Noisy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(3) + float(np.random.rand()), index

    found = {}
    for workers in (0, 1, 2):
        batches = made(DataConfig(batch_size=4, workers=workers), Shard(), Splits(Noisy(), Noisy()))
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        found[workers] = [x for epoch in (0, 1) for step in batches.epoch(epoch) for x, _ in step]
        assert torch.equal(torch.get_rng_state(), before)  # the trainer's own generator is left alone
        batches.close()
    for workers in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[workers], strict=True))
    assert not torch.equal(found[0][0], found[0][4])


def test_seeds_of_distinct_parts_are_unrelated() -> None:
    assert len({derive_seed(a, b) for a in range(50) for b in range(50)}) == 2500
    assert derive_seed(1, 23) != derive_seed(12, 3) and 0 <= derive_seed(0) < 2**63


@pytest.mark.parametrize(("size", "world", "micro"), [(10, 4, 1), (10, 1, 3), (6, 2, 2)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(size: int, world: int, micro: int) -> None:
    with pytest.raises(
        ConfigError, match=f"data.batch_size={size} does not divide.*Take a multiple of {world * micro}, e.g. "
    ) as caught:
        made(DataConfig(batch_size=size), Shard(0, world, micro))
    advised = int(str(caught.value).rstrip(".").rsplit(" ", 1)[1])
    made(DataConfig(batch_size=advised), Shard(0, world, micro))


def test_splits_are_made_of_what_users_have() -> None:
    x, y = torch.rand(20, 3), torch.arange(20)
    pair = as_splits((torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(x, y)), "mine")
    assert isinstance(pair.train, Arrays) and pair.num_classes == 20 and pair.sample_shape == (3,)
    one = as_splits(torch.utils.data.TensorDataset(x, y), "mine")
    held = {int(label) for _, label in one.eval}  # type: ignore[union-attr]
    kept = {int(label) for _, label in one.train}  # type: ignore[union-attr]
    assert len(held) == 2 and len(kept) == 18 and not held & kept
    with pytest.raises(DataError, match="20 samples but 19 labels"):
        Arrays(x, y[:19])


# -- augmentations against their definitions ------------------------------------------------------------------------


class Given(Draw):
    """Draws that a test chose."""

    def __init__(self, *drawn: list[float]) -> None:
        self.drawn = [torch.tensor(values) for values in drawn]

    def integers(self, low: int, high: int) -> Tensor:
        found = self.drawn.pop(0)
        assert found.min() >= low and found.max() <= high
        return found

    def uniform(self) -> Tensor:
        return self.drawn.pop(0)


def test_a_crop_is_cut_from_the_padded_image() -> None:
    x = torch.randint(1, 255, (3, 2, 16, 16), dtype=torch.uint8)
    top, left = [0, 2, 4], [4, 1, 2]
    found = crop(x, Given(top, left))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for sample in range(3):
        expected = padded[sample, :, top[sample] : top[sample] + 16, left[sample] : left[sample] + 16]
        np.testing.assert_array_equal(found[sample], expected)


def test_a_shift_moves_by_a_pixel() -> None:
    x = torch.randint(1, 255, (1, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(shift(x, Given([1], [1])), x)
    assert torch.equal(shift(x, Given([2], [1]))[..., :-1, :], x[..., 1:, :])
    assert shift(x, Given([2], [1]))[..., -1, :].eq(0).all()


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.randint(1, 255, (2, 3, 5, 6), dtype=torch.uint8)
    found = flip(x, Given([0.49, 0.5]))
    assert torch.equal(found[0], x[0].flip(2)) and torch.equal(found[1], x[1])


def test_a_cutout_blanks_a_square_around_its_centre() -> None:
    x = torch.randint(1, 255, (1, 2, 8, 8), dtype=torch.uint8)
    found = cutout(x, Given([4], [0]))[0]
    blank = (found == 0).all(0)
    rows, columns = torch.where(blank)
    assert set(rows.tolist()) == {3, 4, 5} and set(columns.tolist()) == {0, 1}
    assert torch.equal(found[:, ~blank], x[0][:, ~blank])


def test_draws_are_uniform() -> None:
    draw = Draw(torch.Generator().manual_seed(0), 60_000, slice(0, 60_000))
    counts = torch.bincount(draw.integers(0, 5), minlength=6)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 25
    values = draw.uniform()
    assert values.min() >= 0 and values.max() < 1 and float(values.mean()) == pytest.approx(0.5, abs=0.01)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    splits, whole = load_splits(DataConfig(name="digits")), load_digits()
    held_out = np.arange(len(whole.target)) % 5 == 0
    for part, chosen in ((splits.train, ~held_out), (splits.eval, held_out)):
        assert isinstance(part, Arrays)
        assert np.array_equal(part.x[:, 0], np.rint(whole.images[chosen] * (255 / 16)))
        assert np.array_equal(part.y, whole.target[chosen])
