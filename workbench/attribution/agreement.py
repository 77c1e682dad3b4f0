"""How far two maps of credits agree: by direction, by order, by their largest parts; and how far chance alone would."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attribution.windows import patches_of


def patch_means(credits: Tensor, patches: int) -> Tensor:
    """Mean credit by patch (rows, columns) of one sample (1, ...): of an image its patches, of a sequence or features one row."""
    groups = patches_of(credits, patches)
    if groups is None:
        return credits.reshape(1, -1).cpu()
    flat = groups.expand_as(credits).flatten()
    count = int(flat.max()) + 1
    sums = torch.zeros(count, device=credits.device).index_add(0, flat, credits.flatten())
    means = (sums / flat.bincount(minlength=count)).cpu()
    return means.reshape(min(patches, credits.shape[-2]), -1) if credits.dim() >= 4 else means.reshape(1, -1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two maps; 1 where both are zero everywhere, 0 where one is."""
    a, b = a.double(), b.double()
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else float(torch.equal(a, b))


def ranks(values: Tensor) -> Tensor:
    """Ranks about their mean, equal values sharing theirs; their cosine is Spearman's correlation."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2


def overlap(a: Tensor, b: Tensor, count: int) -> float:
    """Share of the ``count`` parts with the largest absolute credits that two maps have in common."""
    largest = [set(values.abs().topk(count).indices.tolist()) for values in (a, b)]
    return len(largest[0] & largest[1]) / count


def chance_cosine(a: Tensor, b: Tensor) -> float:
    """Mean of :func:`cosine` over all orders in which the parts of ``b`` could stand: that of the maps' means.

    Of the rank correlation that mean is 0; of :func:`overlap` it is count / parts.
    """
    a, b = a.double(), b.double()
    lengths = float(a.norm() * b.norm())
    return len(a) * float(a.mean() * b.mean()) / lengths if lengths else 0.0
