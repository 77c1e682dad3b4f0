"""Images and maps of credits as small PNGs in data URIs; the two colours of every drawing of credits."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FOR, AGAINST = (240, 150, 0), (50, 110, 230)
"""Amber speaks for the output that is explained, blue against it: apart for colour-blind readers, on light and dark."""
OPAQUE = 0.9
"""Opacity of the largest credit."""


def picture(sample: Tensor, longest: int = 0) -> str:
    """An image (C, H, W) of numbers, stretched to the whole range of brightness; "" for what is no image.

    Args:
        longest: pixels of the longer side, at most; 0: as many as there are.
    """
    if sample.dim() != 3 or not sample.is_floating_point():
        return ""
    from PIL import Image

    image = sample.float().cpu()
    image = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    pixels = (_stretched(image) * 255).round().byte().permute(1, 2, 0)
    drawn = Image.fromarray(pixels.squeeze(-1).numpy())
    if longest:
        drawn.thumbnail((longest, longest))
    return data_uri(drawn)


def heat(grid: Sequence[Sequence[float]], most: float = 0.0) -> str:
    """Credits, a pixel each: amber for, blue against, clear for neither.

    Args:
        most: absolute credit of the full colour; 0: the largest there is.
    """
    from PIL import Image

    values = torch.tensor(grid, dtype=torch.float64)
    share = (values / (most or float(values.abs().max()) or 1.0)).clamp(-1, 1)
    colours = torch.where((share > 0)[..., None], torch.tensor(FOR), torch.tensor(AGAINST))
    opacity = (255 * OPAQUE * share.abs()).round()
    pixels = torch.cat([colours, opacity[..., None]], -1).byte()
    return data_uri(Image.fromarray(pixels.numpy(), "RGBA"))


def heat_over(sample: Tensor, credits: Tensor, most: float) -> str:
    """Credits (H, W) in colour over the grey image (C, H, W): pixel by pixel, for the page to enlarge without blurring."""
    from PIL import Image

    # Half the range of brightness, about its middle: colours stay visible on black and on white.
    grey = 0.25 + 0.5 * _stretched(sample.double().cpu().mean(0))
    share = (credits.double().cpu() / (most or 1.0)).clamp(-1, 1)
    colours = torch.where((share > 0)[..., None], torch.tensor(FOR), torch.tensor(AGAINST)) / 255
    opacity = (OPAQUE * share.abs())[..., None]
    mixed = grey[..., None] * (1 - opacity) + colours * opacity
    return data_uri(Image.fromarray((mixed * 255).round().byte().numpy()))


def data_uri(image: Any) -> str:
    """A PIL image as a PNG in a data URI."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _stretched(image: Tensor) -> Tensor:
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp_min(1e-12)
