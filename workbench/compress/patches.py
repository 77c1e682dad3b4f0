"""Convolutions that cut an image into patches, as matrix products: :func:`patches_as_products`.

Where windows don't overlap, a convolution is a linear layer of each patch. GPU libraries compute it several times faster so: with
three input channels, their convolutions keep little of a tensor core busy.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_PATCH = 64
"""Numbers of a patch in each channel, at least: 8 × 8."""


class PatchConv2d(nn.Module):
    """What a convolution [out, in, p, q] with stride (p, q) and no padding computes; it shares the parameters of ``conv``."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.training = conv.weight, conv.bias, False

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H // p, W // q], channels last in memory."""
        p, q = self.weight.shape[2:]
        n, channels, rows, columns = len(x), x.shape[1], x.shape[2] // p, x.shape[3] // q
        cut = x[:, :, : rows * p, : columns * q].reshape(n, channels, rows, p, columns, q)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, channels * p * q)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def patches_as_products(model: nn.Module) -> nn.Module:
    """``model`` with its patch embeddings replaced, in place; names of parameters stay. A convolution by itself stays too."""
    for name, module in [*model.named_modules()]:
        if name and type(module) is nn.Conv2d and _cuts_patches(module):
            model.set_submodule(name, PatchConv2d(module))
    return model


def _cuts_patches(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return plain and conv.stride == conv.kernel_size and conv.kernel_size[0] * conv.kernel_size[1] >= SMALLEST_PATCH
