"""Residual networks for small images (He et al. 2016, arXiv:1512.03385).

Section 4.2's CIFAR networks of depth 6n + 2 and width 16-32-64, and ResNet-18 with a 3×3 stem and no max-pooling, as
commonly used at 32×32. Shortcuts that change shape are 1×1 convolutions (the paper's option B).
"""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3×3 stem, stages of basic blocks, average pooling, a linear classifier.

    Args:
        widths: channels of each stage; every stage but the first halves the resolution.
        depths: blocks in each stage.
    """

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(channels, width, stride=2 if index > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


def _small(depth: int, num_classes: int, in_channels: int, width: int) -> ResNet:
    blocks = (depth - 2) // 6
    return ResNet((width, 2 * width, 4 * width), (blocks,) * 3, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNet:
    """Depth 20; 0.27 M parameters at width 16."""
    return _small(20, num_classes, in_channels, width)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNet:
    """Depth 32; 0.46 M parameters at width 16."""
    return _small(32, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNet:
    """Depth 56; 0.85 M parameters at width 16."""
    return _small(56, num_classes, in_channels, width)


def resnet18_cifar(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-18 with a 3×3 stem and no max-pooling; 11.17 M parameters at width 64."""
    return ResNet((width, 2 * width, 4 * width, 8 * width), (2, 2, 2, 2), num_classes, in_channels)
