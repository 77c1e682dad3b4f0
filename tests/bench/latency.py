"""Pruning to a latency: how near ResNet-18 lands, timed anew beside the whole model in turns.

python -m tests.bench.latency [--ratios 0.3 0.5] [--model resnet18] [--size 224]
"""

from __future__ import annotations

import argparse

import torch

from workbench import PruneConfig, prune
from workbench.compress import compiled
from workbench.compress.latency import latency_of, ratio_of
from workbench.models import ModelConfig, build_model
from workbench.models.structure import structure_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=arguments.model, num_classes=1000)).eval()
    x = torch.randn(1, 3, arguments.size, arguments.size)
    whole = compiled(model)
    for ratio in arguments.ratios:
        pruned = prune(model, PruneConfig(ratio=ratio, target="latency"), x).eval()
        fast = compiled(pruned)
        taken = latency_of({"pruned": lambda fast=fast: fast(x), "whole": lambda: whole(x)}, rounds=400, seconds=6)
        left = ratio_of(taken["pruned"], taken["whole"])
        record = structure_of(pruned).transforms[-1]
        print(
            f"asked for −{ratio:.0%} of the time: {left - 1:+.1%} ({left / (1 - ratio) - 1:+.1%} of the target), "
            f"{record['after']['parameters'] / record['before']['parameters'] - 1:+.0%} parameters",
            flush=True,
        )


if __name__ == "__main__":
    main()
