"""Structured pruning: whole channels go, the model stays dense, smaller and ordinary.

* :func:`prune` — a new, smaller model; :class:`ChannelPruner` is the same as a class.
* criteria (``pruning_config.CRITERIA``) — functions from a group of coupled layers to one score a channel.
* a record of what stayed, layer by layer, in ``model.structure``; :mod:`~workbench.compress.surgery` cuts and rebuilds by it.

Which layers are coupled (a residual sum ties the outputs of all its branches) is found by torch-pruning's dependency graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.compress.pruning_config import CRITERIA, PruneConfig
from workbench.compress.surgery import History, attention_heads, explained, refresh_attention, reshaped, survivors
from workbench.errors import ConfigError, ModelError, unknown
from workbench.models.structure import count_parameters, is_channels_last, structure_of

_STEPS = 14
"""Bisections of the channel ratio: to 1/16384, finer than one channel of common models."""


class ChannelPruner:
    """Prune a model: ``ChannelPruner(model, pruning_ratio=0.3).compress()``; the given model stays as it is.

    Args:
        pruning_ratio: fraction of the parameters to remove.
        example: one input (1, ...) or a batch; without it, inferred from the first layer.
        settings: further fields of :class:`PruneConfig`.
    """

    def __init__(self, model: nn.Module, pruning_ratio: float = 0.3, example: Any = None, **settings: Any) -> None:
        self.model, self.example = model, example
        self.config = PruneConfig(ratio=pruning_ratio, **settings)

    def compress(self) -> nn.Module:
        return prune(self.model, self.config, self.example)


def prune(model: nn.Module, config: PruneConfig | None = None, example: Any = None) -> nn.Module:
    """A copy of ``model`` with its least important channels removed; the given model stays as it is.

    Fine-tune it afterwards: the weights that stay are unchanged, so accuracy drops first.

    Args:
        config: by default 30 % of the parameters, ranked by L1 norm.
        example: an input (N, ...) or a batch (x, y), of which one sample is used; without it, inferred from the first layer.

    Returns:
        The pruned model, in the given one's mode. ``pruned.structure.transforms[-1]`` tells parameters and MACs before and
        after, and per changed layer the channels of the original that stayed (``out``, ``in``).

    Raises:
        ModelError: the model can't be traced or pruned, or so much can't be removed.
        ConfigError: an ignored layer that isn't there.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023) and "Isomorphic Pruning" (ECCV 2024).
    """
    config = config or PruneConfig()
    source = copy.deepcopy(model).eval().requires_grad_(True)  # coupling is traced through autograd: frozen layers count too
    x = _one_sample(source, example)
    ignored = _matching(source, config.ignored) | _outputs(source, x)
    history, removed = _search(source, x, ignored, config)
    record = {
        "kind": "prune",
        "config": config.model_dump(mode="json"),
        "example": list(x.shape),
        "removed": removed,
        "before": {"parameters": count_parameters(source), "macs": count_macs(source, x)},
    }
    layers, positions = survivors(source, x, history)
    pruned = reshaped(
        copy.deepcopy(model), layers, lambda name, old, shape: old.detach().flatten()[positions[name].to(old.device)]
    )
    if is_channels_last(model):
        pruned = pruned.to(memory_format=torch.channels_last)
    with explained(model):  # some couplings show only when the pruned model runs
        record["after"] = {"parameters": count_parameters(pruned), "macs": count_macs(pruned, x)}
    record["layers"] = layers
    pruned.structure = structure_of(model).then(record)  # type: ignore[assignment]
    return pruned


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of one pass over ``x``: convolutions, matrix products, attention."""
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model.eval()(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return int(counter.get_total_flops()) // 2


# Criteria ---------------------------------------------------------------------------------------------------------------


def l1(group: Any) -> torch.Tensor:
    """Mean absolute weight of each channel over the group's layers (Li et al. 2017, arXiv:1608.08710)."""
    import torch_pruning

    scores: torch.Tensor = torch_pruning.importance.MagnitudeImportance(p=1)(group)
    return scores


def l2(group: Any) -> torch.Tensor:
    """Mean squared weight of each channel over the group's layers."""
    import torch_pruning

    scores: torch.Tensor = torch_pruning.importance.MagnitudeImportance(p=2)(group)
    return scores


def random(group: Any) -> torch.Tensor:
    """A random score each: the baseline that a criterion must beat."""
    return torch.rand(len(group[0].idxs))


# Search -----------------------------------------------------------------------------------------------------------------


def _search(source: nn.Module, x: torch.Tensor, ignored: set[str], config: PruneConfig) -> tuple[History, float]:
    """The least pruning that removes at least ``config.ratio`` of the target, by bisection on the channel ratio."""

    def measure(model: nn.Module) -> int:
        return count_parameters(model) if config.target == "parameters" else count_macs(model, x)

    total = measure(source)
    best: tuple[float, History] | None = None
    most, low, high = 0.0, 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        trial, history = _trial(source, x, ignored, config, middle)
        removed = 1 - measure(trial) / total
        most = max(most, removed)
        if removed >= config.ratio and (best is None or removed < best[0]):
            best = removed, history
        low, high = (low, middle) if removed >= config.ratio else (middle, high)
        if best is not None and best[0] - config.ratio < 1e-3:
            break
    if best is None:
        raise ModelError(
            f"{config.ratio:.0%} of the {config.target} can't be removed from {type(source).__name__}: at most {most:.1%}.",
            "Ask for less, set round_to=1, or ignore fewer layers."
            if most
            else "None of its layers can be pruned: quantize it instead.",
        )
    return best[1], best[0]


def _trial(source: nn.Module, x: torch.Tensor, ignored: set[str], config: PruneConfig, ratio: float) -> tuple[nn.Module, History]:
    """A pruned copy and the steps that made it, with ``ratio`` of the channels removed."""
    import torch_pruning

    model = copy.deepcopy(source)
    with explained(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        pruner = torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=_scored_by(config.criterion),
            pruning_ratio=ratio,
            global_pruning=True,
            isomorphic=True,  # layers are ranked against their like: a global rank empties whole layers
            round_to=config.round_to if config.round_to > 1 else None,
            ignored_layers=[model.get_submodule(name) for name in ignored],
            num_heads=attention_heads(model),
            in_channel_groups={},  # the library's defaults are shared between all its pruners
            out_channel_groups={},
        )
        pruner.step()
        history = [(name, is_out, [int(i) for i in indices]) for name, is_out, indices in pruner.pruning_history()]
    refresh_attention(model)
    return model, history


def _scored_by(criterion: str) -> Callable[[Any], torch.Tensor]:
    score = CRITERIA.factory(criterion)

    def checked(group: Any) -> torch.Tensor:
        scores, expected = score(group), len(group[0].idxs)
        if not isinstance(scores, torch.Tensor) or scores.shape != (expected,):
            found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ConfigError(f"The criterion {criterion!r} gave {found} for {expected} channels.", "Return one score a channel.")
        return scores

    return checked


# Reading the model ------------------------------------------------------------------------------------------------------


def _matching(model: nn.Module, patterns: list[str]) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatch(name, pattern)}
        if not matches:
            raise unknown("layer", pattern, names)
        found |= matches
    return found


def _outputs(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Layers whose output channels are outputs of the model: those coupled with a node that nothing consumes."""
    import torch_pruning

    traced = copy.deepcopy(model)
    names = {module: name for name, module in traced.named_modules()}
    found: set[str] = set()
    with explained(model):
        graph = torch_pruning.DependencyGraph().build_dependency(traced, x)
        for group in graph.get_all_groups():
            if any(not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler) for dep, _ in group):
                found |= {
                    names[dep.target.module]
                    for dep, _ in group
                    if graph.is_out_channel_pruning_fn(dep.handler) and dep.target.module in names
                }
    return found


def _one_sample(model: nn.Module, example: Any) -> torch.Tensor:
    """One sample (1, ...) on the model's device: the given one, or one that the model accepts."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if example is not None:
        x = example[0] if isinstance(example, tuple | list) else example
        if not isinstance(x, torch.Tensor) or x.dim() < 2:
            raise ConfigError(
                f"The example is a {type(x).__name__}.", "Pass a tensor with a batch dimension, e.g. torch.zeros(1, 3, 224, 224)."
            )
        return x[:1].detach().to(device)
    for shape in _likely_shapes(model):
        x = torch.zeros(1, *shape, device=device)
        try:
            with torch.no_grad():
                model(x)
        except Exception:  # a guess that the model refuses; the next one is tried
            continue
        return x
    raise ModelError(
        f"No input for {type(model).__name__} could be guessed.", "Pass example=, one input with its batch dimension."
    )


def _likely_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    if published := getattr(model, "pretrained_cfg", None):
        yield tuple(published["input_size"])
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
    elif first is not None:
        sizes = (224, 32) if first.stride[0] > 1 else (32, 28, 64, 224)
        yield from ((first.in_channels, size, size) for size in sizes)
