"""Small models for the tests of compression, as a run folder would name them: ``nets.py:residual``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Every way a value reaches a layer: after pooling, a functional ReLU, a shortcut with and without a convolution.

    Batch normalization (eps, momentum) and dropout (p) are none that PyTorch would choose by itself.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, bias=False), self.norm(width), nn.ReLU(), nn.MaxPool2d(2))
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), self.norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), self.norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), self.norm(2 * width)
        self.shortcut, self.norm4 = nn.Conv2d(width, 2 * width, 1, stride=2), self.norm(2 * width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(2 * width, num_classes)

    @staticmethod
    def norm(width: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        x = F.relu(self.norm4(self.shortcut(x)) + self.norm3(self.conv3(x)))
        return self.head(self.dropout(x.mean((2, 3))))


class Tokens(nn.Module):
    """Ids [N, L] to classes [N, 10]."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1)
        return self.head((self.body(self.embed(ids)) * mask).sum(1) / mask.sum(1).clamp(min=1))


class Separable(nn.Module):
    """A depthwise convolution after a hardswish whose channels differ up to ``spread``-fold, as trained ones may."""

    gain: Tensor

    def __init__(self, num_classes: int = 10, spread: float = 1.0) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.register_buffer("gain", torch.logspace(0, 1, 8).view(1, 8, 1, 1) ** (-torch.tensor(spread).log10()))
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pointwise, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x))) * self.gain
        x = F.relu(self.pointwise(F.relu(self.norm2(self.depthwise(x)))))
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """A table read at both ends, as language models have, with a hidden layer between that is free."""

    def __init__(self, num_classes: int = 50) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(num_classes, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.out = nn.Linear(16, num_classes, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.down(torch.relu(self.up(self.table(ids).mean(1)))))


class Attending(nn.Module):
    """Ids [N, L] to classes [N, 16] by attention: three layers that read the same tensor."""

    def __init__(self, num_classes: int = 16) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(x.mean(1))


def residual(num_classes: int = 10, in_channels: int = 1, width: int = 8) -> nn.Module:
    model = Residual(num_classes, in_channels, width)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():  # as after training: statistics that folding must take into account
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def tokens(num_classes: int = 10) -> nn.Module:
    return Tokens(num_classes)


def separable(num_classes: int = 10, spread: float = 1.0) -> nn.Module:
    return Separable(num_classes, spread)


def tied(num_classes: int = 50) -> nn.Module:
    return Tied(num_classes)
