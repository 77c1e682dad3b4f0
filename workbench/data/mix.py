"""Training on pairs: samples are mixed two by two, and so are their targets.

Sample i of a global batch of N is paired with sample N - 1 - i; its share is drawn from Beta(alpha, alpha) by sample. Class
labels become probabilities [B, classes], which the cross-entropy takes as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.data.augment import Draw
from workbench.errors import ConfigError


def mixup(x: Tensor, partner: Tensor, draw: Draw, alpha: float) -> tuple[Tensor, Tensor]:
    """``share * x + (1 - share) * partner`` (Zhang et al. 2017, arXiv:1710.09412).

    Args:
        x, partner: floating-point [B, ...].

    Returns:
        The mixed samples, and the share [B] of ``x`` in each.
    """
    share = draw.beta(alpha)
    factor = share.view(-1, *[1] * (x.ndim - 1))
    return (partner + factor * (x - partner)).to(x.dtype), share


def cutmix(x: Tensor, partner: Tensor, draw: Draw, alpha: float) -> tuple[Tensor, Tensor]:
    """A box of ``partner`` pasted into ``x``, cut off at the border (Yun et al. 2019, arXiv:1905.04899).

    Args:
        x, partner: [B, C, H, W].

    Returns:
        The mixed images, and the share [B] of the area that ``x`` keeps in each.
    """
    _, _, height, width = x.shape
    side = (1 - draw.beta(alpha)).sqrt() / 2  # half the box's, as a share of the image's
    inside = []
    for size in (height, width):
        centre = draw.integers(0, size - 1)
        half = (side * size).floor()
        place = torch.arange(size, device=x.device)
        inside.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
    rows, columns = inside  # [B, H], [B, W]
    box = rows[:, :, None] & columns[:, None, :]  # [B, H, W]
    return partner.where(box[:, None], x), 1 - box.float().mean((1, 2))


def mix_targets(y: Tensor, partner: Tensor, share: Tensor, classes: int | None) -> Tensor:
    """Targets blended by share: labels [B] as probabilities float32 [B, classes], numbers [B, ...] as numbers.

    Raises:
        ConfigError: labels of an unknown number of classes.
    """
    if not y.is_floating_point():
        if classes is None:
            raise ConfigError("data.mix needs the number of classes of the labels.", "Give Splits(…, classes=…).")
        y, partner = (F.one_hot(part, classes).float() for part in (y, partner))
    return partner + share.view(-1, *[1] * (y.ndim - 1)) * (y - partner)
