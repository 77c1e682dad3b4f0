"""What a data set's loader returns: :class:`Splits`, of tensors held in memory or of torch datasets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from workbench.data.cards import card_names, read_card
from workbench.data.config import DataConfig
from workbench.errors import ConfigError, DataError
from workbench.registry import find_source, load_object
from workbench.storage import load_dumped


@dataclass(frozen=True)
class Arrays:
    """Samples held in memory.

    Attributes:
        x: [N, C, H, W] uint8 images, or [N, ...] floating-point features.
        y: [N] labels or targets.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise DataError(f"There are {len(self.x)} samples but {len(self.y)} labels.", "Each sample needs one label.")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.y.nbytes


@dataclass(frozen=True)
class Splits:
    """Training and evaluation samples of one data set.

    Attributes:
        train, eval: :class:`Arrays`, or map-style torch datasets of (x, y).
        classes: names of the classes in label order; empty when the task is not classification.
        mean, std: by channel, of pixel values scaled to 0…1; applied to uint8 images on the device.
        augment: augmentations that suit the data.
        tokens: text of each token id, "" for padding; empty when the inputs are no token ids.
        columns: names of a table's columns or a series' channels, in order; empty when they have none.
    """

    train: Arrays | Dataset[Any]
    eval: Arrays | Dataset[Any]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: tuple[str, ...] = field(default=())
    tokens: tuple[str, ...] = field(default=(), repr=False)
    columns: tuple[str, ...] = ()

    @property
    def first_input(self) -> Any:
        """The input of training sample 0.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return self.train.x[0] if isinstance(self.train, Arrays) else self.train[0][0]
        except Exception as error:
            raise DataError(f"Sample 0 cannot be read: {type(error).__name__}: {error}.", "Mend or remove it.") from error

    @property
    def sample_shape(self) -> tuple[int, ...]:
        x = self.first_input
        return tuple(x.shape) if isinstance(x, Tensor) else ()

    @property
    def num_classes(self) -> int | None:
        if self.classes:
            return len(self.classes)
        if isinstance(self.train, Arrays) and not self.train.y.is_floating_point():
            return int(self.train.y.max()) + 1
        return None


def load_splits(config: DataConfig, given: Any = None, *, root: Path | None = None) -> Splits:
    """The splits that ``config`` names.

    Args:
        given: splits, a (train, eval) pair of torch datasets, or one torch dataset, in place of the named data.
        root: folder against which relative files are looked up first (a run folder).

    Raises:
        DataError: the data is missing or corrupt, or the loader returned something else.
        ConfigError: the name is unknown.
    """
    if given is not None:
        splits = as_splits(given, "the data given")
    elif config.name in card_names():
        card = read_card(config.name)
        splits = replace(
            load_object(card.loader)(**config.args), classes=card.classes, mean=card.mean, std=card.std, augment=card.augment
        )
    elif config.name.endswith(".pkl"):
        kept = Path(find_source(config.name, root))
        if not kept.is_file():
            raise DataError(
                "The data was given as an object, of which the run folder could keep no copy.",
                "Give it again: train(config, data=…).",
            )
        splits = as_splits(load_dumped(kept), "the data given")
    else:
        splits = as_splits(load_object(find_source(config.name, root))(**config.args), config.name)
    for part in (splits.train, splits.eval):
        if not hasattr(part, "__len__"):
            raise DataError(
                f"A {type(part).__name__} has no length, so there is no epoch of it.",
                "Take a data set with __len__ and __getitem__.",
            )
    if config.holdout:
        splits = hold_out(splits, config.holdout, config.holdout_seed)
    if config.limit is not None:
        splits = replace(splits, train=_subset(splits.train, torch.arange(min(config.limit, len(splits.train)))))  # type: ignore[arg-type]
    if len(splits.train) == 0 or len(splits.eval) == 0:  # type: ignore[arg-type]
        raise DataError(f"The data set {config.name!r} has an empty split.", "Both training and evaluation need samples.")
    return splits if config.resize is None else resized(splits, config.resize)


def as_splits(found: Any, origin: str) -> Splits:
    """Splits from what a user's loader returned."""
    if isinstance(found, Splits):
        return found
    if isinstance(found, tuple) and len(found) == 2:
        train, evaluation = (_in_memory(part) for part in found)
        return Splits(train, evaluation)
    if hasattr(found, "__getitem__") and hasattr(found, "__len__"):
        count = len(found)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        cut = max(1, count // 10)
        subset: Callable[[list[int]], Dataset[Any]] = lambda keep: torch.utils.data.Subset(found, keep)  # noqa: E731
        return Splits(subset(order[cut:]), subset(order[:cut]))
    raise DataError(
        f"{origin} gave {type(found).__name__}, not data.",
        "Return workbench.data.Splits, a pair (train, eval) of torch datasets, or one torch dataset (a tenth is then held out).",
    )


def hold_out(splits: Splits, amount: float, seed: int = 0) -> Splits:
    """Splits whose evaluation samples are some of the training samples: the original ones are not looked at.

    Where labels are held in memory, each class gives its part of them (to within one sample).

    Args:
        amount: a share below 1, or a number of samples.
        seed: of which.

    Raises:
        ConfigError: it leaves no sample to train on, or holds none out.
    """
    train = splits.train
    count = len(train)  # type: ignore[arg-type]
    wanted = round(amount * count) if amount < 1 else round(amount)
    if not 0 < wanted < count:
        raise ConfigError(
            f"data.holdout={amount:g} would hold out {wanted} of {count} training samples.", "Hold out some, not all."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    labels = train.y if isinstance(train, Arrays) else getattr(train, "targets", None)  # as torchvision's data sets have
    held = order[:wanted]
    with suppress(TypeError, ValueError, RuntimeError):
        labels = torch.as_tensor(labels)
        if labels.shape == order.shape and not labels.is_floating_point():
            held = stratified(order, labels, wanted)
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[held] = True
    return replace(splits, train=_subset(train, torch.where(~is_held)[0]), eval=_subset(train, torch.where(is_held)[0]))


def resized(splits: Splits, side: int) -> Splits:
    """Splits whose images [C, H, W] are scaled to squares of ``side`` pixels, bilinearly, without aliasing.

    Raises:
        ConfigError: the samples aren't images held in memory.
    """
    found: list[Arrays] = []
    for part in (splits.train, splits.eval):
        if not isinstance(part, Arrays) or part.x.dim() != 4:
            raise ConfigError(
                f"data.resize={side} scales images held in memory, which these samples aren't.",
                "Scale them in the data set's own transform.",
            )
        found.append(Arrays(F.interpolate(part.x, (side, side), mode="bilinear", antialias=True), part.y))
    return replace(splits, train=found[0], eval=found[1])


def stratified(order: Tensor, labels: Tensor, wanted: int) -> Tensor:
    """The first samples in ``order`` of each class, ``wanted`` in all, shared out by largest remainders."""
    _, classes, sizes = labels[order].unique(return_inverse=True, return_counts=True)
    quota = sizes.double() * wanted / len(order)
    taken = quota.floor().long()
    taken[(quota - taken).argsort(descending=True, stable=True)[: wanted - int(taken.sum())]] += 1
    by_class = classes.argsort(stable=True)
    place = torch.empty_like(order)  # of each sample among those of its class
    place[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[classes[by_class]]
    return order[place < taken[classes]]


def _subset(part: Arrays | Dataset[Any], rows: Tensor) -> Arrays | Dataset[Any]:
    if isinstance(part, Arrays):
        return Arrays(part.x[rows], part.y[rows])
    return torch.utils.data.Subset(part, rows.tolist())


def _in_memory(part: Any) -> Any:
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        return Arrays(*part.tensors)
    return part
