"""Samples read by a loader's processes, and brought to the device.

A sample draws random numbers of its own, whichever process reads it. What goes wrong there travels as an error in the place of a
batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from workbench.data.order import derive_seed
from workbench.data.splits import Arrays
from workbench.errors import DataError, WorkbenchError

PREFETCH = 4
"""Batches that each process of a lasting loader reads ahead."""


def make_loader(
    source: Any, seed: int, plan: Iterable[list[tuple[int, int]]], workers: int, *, lasting: bool = False, pinned: bool = False
) -> DataLoader[Any]:
    """A loader of the samples of ``source`` that ``plan`` says, in ``workers`` processes.

    Args:
        seed: of the samples' random numbers.
        plan: (epoch, index) pairs by batch.
        lasting: its processes stay for further passes, and read :data:`PREFETCH` batches ahead.
        pinned: batches lie in pinned memory.
    """
    return DataLoader(
        _Seeded(source, seed),
        batch_sampler=plan,
        num_workers=workers,
        persistent_workers=lasting and workers > 0,
        prefetch_factor=PREFETCH if lasting and workers else None,
        pin_memory=pinned,
        collate_fn=_collate,
        generator=torch.Generator(),  # else each pass over the loader draws from the generator that dropout draws from
    )


def end(iterator: Any) -> None:
    """End a loader's processes, if it has any."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def moved(loader: Iterator[Any], device: torch.device, check: Callable[[Tensor], None]) -> Iterator[tuple[Any, Tensor]]:
    """Batches on the device; on an accelerator the next one is copied while the present one is used.

    Args:
        loader: of pairs, or errors in their place.
        check: looks at targets before an accelerator gets them.

    Raises:
        DataError: a sample cannot be read, or is no pair.
    """
    if device.type != "cuda":
        for batch in loader:
            yield _checked(batch, check)
        return
    stream = torch.cuda.Stream(device)
    ahead: Any = None
    for batch in loader:
        _checked(batch, check)
        with torch.cuda.stream(stream):
            copied = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
        if ahead is not None:
            yield _handed_over(ahead, stream)
        ahead = copied
    if ahead is not None:
        yield _handed_over(ahead, stream)


def _handed_over(batch: Any, stream: torch.cuda.Stream) -> tuple[Any, Tensor]:
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    torch.utils._pytree.tree_map_only(Tensor, lambda t: t.record_stream(current), batch)
    return batch


def _checked(batch: Any, check: Callable[[Tensor], None]) -> tuple[Any, Tensor]:
    if isinstance(batch, WorkbenchError):
        raise batch
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise DataError(f"A sample is a {type(batch).__name__}, not a pair (x, y).", "Return (input, target) from the data set.")
    if isinstance(batch[1], Tensor):
        check(batch[1])
    return batch  # type: ignore[return-value]


class _Seeded(Dataset[Any]):
    """A data set whose samples draw the same random numbers whichever process reads them, and whenever."""

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed = derive_seed(self.seed, epoch, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - users' transforms draw from the global generator
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the accelerator's generator too
        if isinstance(self.source, Arrays):
            return self.source.x[index], self.source.y[index]
        return self.source[index]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        # Without worker processes the global generators are the trainer's own: give them back as they were.
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        samples: list[Any] = []
        try:
            for key in keys:
                try:
                    samples.append(self[key])
                except WorkbenchError as error:
                    samples = [error]
                    break
                except Exception as error:
                    samples = [
                        DataError(f"Sample {key[1]} cannot be read: {type(error).__name__}: {error}.", "Mend or remove it.")
                    ]
                    break
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
            torch.set_rng_state(kept[2])
        return samples


def _collate(samples: list[Any]) -> Any:
    """A batch, or the error that a loader process met, which travels to the trainer as it is."""
    if isinstance(samples[0], WorkbenchError):
        return samples[0]
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        return DataError(f"Samples do not stack into a batch: {error}.", "Give every sample the same shape and type.")
