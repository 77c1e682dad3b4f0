"""Small networks without batch normalization, for first steps and for comparisons across batch splits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def convnet(num_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (32, 64), groups: int = 8) -> nn.Sequential:
    """Convolution, group normalization, ReLU and pooling per width; [B, in_channels, H, W] -> logits [B, num_classes].

    Group normalization (Wu & He 2018, arXiv:1803.08494) does not depend on the batch, so that losses are the same however a
    batch is split over processes.
    """
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU(inplace=True)]
        if index + 1 < len(widths):
            layers.append(nn.MaxPool2d(2))
        in_channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


def mlp(num_classes: int = 10, in_channels: int = 1, size: int = 8, widths: Sequence[int] = (64, 64)) -> nn.Sequential:
    """Fully connected layers with ReLU; [B, in_channels, size, size] -> logits [B, num_classes]."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = in_channels * size * size
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))
