"""TrivialAugment Wide: one random operation of random strength a sample (Müller & Hutter 2021, arXiv:2103.10158).

Computed for a whole batch on the device: every operation is applied to all samples and each sample takes its own, which
needs no look at the drawn numbers from the host. Operations are those of torchvision's ``TrivialAugmentWide``; images are
taken as uint8 values 0…255, in float32 while they are computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.data.augment import Draw

SHEAR, SHIFT, TURN, BLEND = 0.99, 32, 135.0, 0.99
"""Largest shear (ratio), shift (pixels, at most the side), rotation (degrees) and change of colours (share)."""
GEOMETRIC = ("identity", "shear_x", "shear_y", "shift_x", "shift_y", "rotate")
BLENDING = ("brightness", "color", "contrast", "sharpness")
TONAL = ("posterize", "solarize", "autocontrast", "equalize")
OPERATIONS = GEOMETRIC + BLENDING + TONAL


def trivial(x: Tensor, draw: Draw) -> Tensor:
    """One of :data:`OPERATIONS` at a strength drawn uniformly, per sample; half of the signed ones go the other way."""
    chosen = draw.integers(0, len(OPERATIONS) - 1)
    strength = draw.integers(0, 30).float() / 30  # [B], in 31 steps as in the paper
    sign = 2 * draw.integers(0, 1).float() - 1
    return apply(x, chosen, strength, sign)


def apply(x: Tensor, chosen: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Operation number ``chosen`` [B] of :data:`OPERATIONS` at ``strength`` [B] in 0…1 with ``sign`` [B] of -1 or 1."""
    images = x.float()
    picked = {name: (chosen == index)[:, None, None, None] for index, name in enumerate(OPERATIONS)}
    geometric = (chosen > 0) & (chosen < len(GEOMETRIC))
    found = torch.where(geometric[:, None, None, None], _warp(images, chosen, strength * sign), images)

    gray = _gray(images)
    smooth = images if min(images.shape[2:]) < 3 else _smooth(images)
    dull = torch.where(picked["color"], gray, torch.zeros_like(images))
    dull = torch.where(picked["contrast"], gray.floor().mean((2, 3), keepdim=True), dull)
    dull = torch.where(picked["sharpness"], smooth, dull)
    blended = (dull + (images - dull) * (1 + BLEND * strength * sign)[:, None, None, None]).clamp(0, 255).floor()
    blending = (chosen >= len(GEOMETRIC)) & (chosen < len(GEOMETRIC) + len(BLENDING))
    found = torch.where(blending[:, None, None, None], blended, found)

    found = torch.where(picked["posterize"], _posterize(images, strength), found)
    threshold = (255 * (1 - strength))[:, None, None, None]
    found = torch.where(picked["solarize"], torch.where(images >= threshold, 255 - images, images), found)
    found = torch.where(picked["autocontrast"], _autocontrast(images), found)
    return torch.where(picked["equalize"], _equalize(images), found).to(x.dtype)


def _warp(images: Tensor, chosen: Tensor, amount: Tensor) -> Tensor:
    """Shear, shift or turn about the centre, each sample by its own affine map; what comes from outside is 0."""
    _, _, height, width = images.shape
    by = {name: torch.where(chosen == index, amount, 0.0)[:, None, None] for index, name in enumerate(GEOMETRIC)}
    turn = by["rotate"] * math.radians(TURN)
    row = torch.arange(height, device=images.device)[None, :, None] - (height - 1) / 2  # [1, H, 1]
    column = torch.arange(width, device=images.device)[None, None, :] - (width - 1) / 2  # [1, 1, W]
    # The inverse map: the output pixel (column, row) is taken from (u, v) of the input. Shears hold the top left corner.
    u = turn.cos() * column - turn.sin() * row + SHEAR * by["shear_x"] * (row + height / 2)
    v = turn.sin() * column + turn.cos() * row + SHEAR * by["shear_y"] * (column + width / 2)
    u = u - (by["shift_x"] * min(SHIFT, width)).trunc()
    v = v - (by["shift_y"] * min(SHIFT, height)).trunc()
    grid = torch.stack([2 * u / width, 2 * v / height], dim=3)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _gray(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of colour images, on every channel; images of another number of channels as they are."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None].expand_as(images)


def _smooth(images: Tensor) -> Tensor:
    """A 3×3 mean whose centre counts five times; the border as it is."""
    channels = images.shape[1]
    # Padding fills on the device; to set an element there would wait for it.
    kernel = 1 + F.pad(torch.full((1, 1), 4.0, device=images.device), (1, 1, 1, 1))
    inner = F.conv2d(images, (kernel / 13).expand(channels, 1, 3, 3), groups=channels).round()
    within = torch.zeros(inner.shape[2:], dtype=torch.bool, device=images.device)
    edge = F.pad(within, (1, 1, 1, 1), value=True)
    return torch.where(edge, images, F.pad(inner, (1, 1, 1, 1)))


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    """8 bits a channel at strength 0, 2 at strength 1."""
    unit = torch.exp2((6 * strength).round())[:, None, None, None]
    return (images / unit).floor() * unit


def _autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to 0…255; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = ((images - low) * (255 / (high - low).clamp(min=1e-6))).clamp(0, 255).floor()
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor) -> Tensor:
    """Each channel's values spread evenly over 0…255, as PIL does: by how many pixels are darker."""
    values = images.flatten(2).contiguous()  # [B, C, H·W]
    ordered = values.sort(dim=2).values
    darker = torch.searchsorted(ordered, values)
    brightest = values.shape[2] - torch.searchsorted(ordered, ordered[:, :, -1:].contiguous())  # pixels of the highest value
    step = (values.shape[2] - brightest) // 255
    spread = ((darker + step // 2) // step.clamp(min=1)).clamp(0, 255).to(images.dtype)
    return torch.where(step > 0, spread, values).view_as(images)
