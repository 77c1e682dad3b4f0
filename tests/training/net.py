"""Small models, named by their path in tests: one whose training draws random numbers; ``pause`` slows its steps."""

from __future__ import annotations

import os
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
