"""Small models, named by their path in tests: one whose training draws random numbers; ``pause`` slows its steps."""

from __future__ import annotations

import time

from torch import Tensor, nn


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
