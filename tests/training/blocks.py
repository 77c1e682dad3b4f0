"""Models of repeated blocks, named by their path in tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """[B, C, H, W] -> the same, with everything whose second computation could differ: dropout, batch normalization."""

    def __init__(self, width: int, dropout: float, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if normed else nn.GroupNorm(2, width)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.act(self.norm(self.conv(x))))


def residual(
    num_classes: int = 10, in_channels: int = 1, width: int = 8, depth: int = 3, dropout: float = 0.2, normed: bool = True
) -> nn.Sequential:
    """[B, in_channels, 8, 8] -> logits [B, num_classes]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.Sequential(*(Residual(width, dropout, normed) for _ in range(depth))),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


class Counting(nn.Module):
    """A block whose output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


class Slopes(nn.Module):
    """A block that keeps much and computes little."""

    def __init__(self) -> None:
        super().__init__()
        self.rectify, self.squash = nn.LeakyReLU(), nn.Hardtanh(-100, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.squash(self.rectify(x)) * 1.01


class Wide(nn.Module):
    """[B, 1, 8, 8] -> logits; ``256 × times`` bytes a sample for each of the tensors that it keeps."""

    def __init__(self, num_classes: int, times: int, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(times, 1))
        self.blocks = nn.Sequential(*(Slopes() for _ in range(depth)))
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(x.flatten(2) * self.scale).mean(1))


def wide(num_classes: int = 10, in_channels: int = 1, times: int = 1600, depth: int = 2) -> Wide:
    return Wide(num_classes, times, depth)
