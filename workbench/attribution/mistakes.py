"""Samples worth a look: those a model is most wrong about, by a pass over the data that keeps only those; or by their places."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.attribution.calls import Model, evaluating, outputs_of
from workbench.attribution.explanation import Explanations, Names, explain_samples
from workbench.attribution_config import AttributionConfig
from workbench.errors import ConfigError, DataError


def most_wrong(
    model: Model,
    data: Iterable[Any],
    count: int = 12,
    method: str = "integrated_gradients",
    config: AttributionConfig | None = None,
    background: Tensor | None = None,
    names: Names | None = None,
) -> Explanations:
    """The samples with the largest cross-entropy, the worst first, each explained for the class that the model prefers.

    Args:
        model: gives outputs (N, classes).
        data: batches (x, y) of inputs (N, ...) and class indices (N,), e.g. a data loader; each is asked for once, and no more
            than ``count`` samples are kept.
        count: how many samples, at most.
        names: of classes, tokens and columns; by default those that ``data`` has.

    The others are those of :func:`~workbench.attribution.explain`.

    Raises:
        ConfigError: ``count`` is less than one, or as by :func:`~workbench.attribution.explain`.
        DataError: a batch is not (x, y), a label is none of the classes, or there are no samples.
    """
    if count < 1:
        raise ConfigError(f"count={count} samples are none to show.", "Ask for at least one.")
    config = AttributionConfig.checked(config)
    attribute = {"method": method, "config": config, "background": background, "names": names or Names.of(data)}
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    worst = sorted(_worst(model, data, count, config.batch_size, device), key=lambda kept: (-kept[0], -kept[1]))
    if not worst:
        raise DataError("There are no samples.", "Pass batches (x, y).")
    found = Explanations()
    # Texts of different lengths, say, are explained apart; the order stays.
    for _, same in itertools.groupby(worst, key=lambda kept: kept[2].shape):
        losses, places, inputs, labels = zip(*same, strict=True)
        del losses
        x = torch.stack(inputs).to(device)
        found += explain_samples(model, x, labels, samples=[-place for place in places], **attribute)  # type: ignore[arg-type]
    return found


def pick_samples(data: Iterable[Any], places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The samples at ``places`` of batches (x, y), counted from 0, which are read no further than they must be.

    Raises:
        DataError: there is no such sample, or those are not of one shape.
    """
    wanted = dict.fromkeys(places)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    place = 0
    for x, y in _batches(data, 2**31):
        found |= {i: (x[i - place], y[i - place]) for i in wanted if place <= i < place + len(x)}
        place += len(x)
        if len(found) == len(wanted):
            break
    missing = [i for i in wanted if i not in found]
    if missing or not wanted:
        raise DataError(f"There is no sample {', '.join(map(str, missing))}.", f"Take 0 … {place - 1}." if place else "")
    if len({x.shape for x, _ in found.values()}) > 1:
        raise DataError(f"The samples {list(wanted)} are of different shapes.", "Take them one by one.")
    return torch.stack([found[i][0] for i in places]), torch.stack([found[i][1] for i in places])


_Kept = tuple[float, int, Tensor, int]
"""Loss, place in the data (negated: of equal losses, the first sample counts as the worse), input, label."""


def _worst(model: Model, data: Iterable[Any], count: int, size: int, device: torch.device | None) -> list[_Kept]:
    heap: list[_Kept] = []
    place = 0
    with evaluating(model):
        for x, y in _batches(data, size):
            outputs = outputs_of(model, x.to(device)).float()
            if not 0 <= int(y.min()) <= int(y.max()) < outputs.shape[1]:
                raise DataError(f"Labels are {int(y.min())} … {int(y.max())}, for {outputs.shape[1]} classes.", "Check the data.")
            losses = F.cross_entropy(outputs, y.to(outputs.device), reduction="none").nan_to_num(nan=torch.inf)
            for i in losses.argsort(descending=True, stable=True)[:count].tolist():
                kept = (float(losses[i]), -(place + i), x[i].detach().cpu().clone(), int(y[i]))
                if len(heap) < count:
                    heapq.heappush(heap, kept)
                elif kept[:2] > heap[0][:2]:
                    heapq.heapreplace(heap, kept)
            place += len(x)
    return heap


def _batches(data: Iterable[Any], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, y) of at most ``size`` samples."""
    for batch in data:
        if not (isinstance(batch, tuple | list) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2])):
            raise DataError(f"A batch is a {type(batch).__name__}, not (x, y).", "Pass batches of input and class-index tensors.")
        x, y = batch[0], batch[1]
        if y.is_floating_point() or y.shape != x.shape[:1]:
            raise DataError(f"Labels are {list(y.shape)} of {y.dtype}, for {len(x)} samples.", "Pass one class index a sample.")
        yield from zip(x.split(size), y.split(size), strict=True)
