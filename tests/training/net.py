"""Small models, named by their path in tests: one whose training draws random numbers; ``pause`` slows its steps."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn

from workbench.data.splits import Arrays, Splits


class Wait(nn.Module):
    """Passes its input on after some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        if self.seconds and self.training:
            time.sleep(self.seconds)
        return x


def net(num_classes: int = 10, in_channels: int = 1, width: int = 8, dropout: float = 0.2, pause: float = 0.0) -> nn.Sequential:
    """[B, in_channels, 8, 8] -> logits [B, num_classes]; without batch normalization."""
    return nn.Sequential(
        Wait(pause),
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.GroupNorm(4, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def normed(num_classes: int = 10, in_channels: int = 1, width: int = 8) -> nn.Sequential:
    """The same with batch normalization."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


class Slowed(nn.Module):
    """Computes its body ``times`` over in one rank, and adds nothing by it."""

    def __init__(self, body: nn.Module, rank: int, times: int) -> None:
        super().__init__()
        self.body = body
        self.more = times - 1 if int(os.environ.get("RANK", 0)) == rank else 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        for _ in range(self.more if self.training else 0):
            y = y + 0 * self.body(x)
        return y


def slowed_net(num_classes: int = 10, in_channels: int = 1, rank: int = 1, times: int = 1, width: int = 64) -> nn.Sequential:
    """The same with most of its work done ``times`` over in one rank, and enough of it to be measured."""
    body = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        Slowed(nn.Sequential(*body), rank, times), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, num_classes)
    )


def vit(num_classes: int = 10, in_channels: int = 1, depth: int = 4, heads: int = 4, width: int = 32) -> nn.Module:
    """[B, in_channels, 8, 8] -> logits [B, num_classes]: timm's vision transformer, small."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=in_channels, num_classes=num_classes, embed_dim=width, depth=depth, num_heads=heads
    )


def words(count: int = 256, length: int = 12, vocabulary: int = 100) -> Splits:
    """Sentences of random lengths; the class is whether more than half of the words are of the first half of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (count, length), generator=generator)
    ids[torch.arange(length)[None] >= torch.randint(4, length + 1, (count, 1), generator=generator)] = 0
    known = (ids > 0).sum(1)
    y = (((ids > 0) & (ids < vocabulary // 2)).sum(1) * 2 > known).long()
    return Splits(Arrays(ids, y), Arrays(ids[:64], y[:64]), classes=("late", "early"))
