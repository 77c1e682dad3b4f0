"""Which channels of which layers can only go together.

* :class:`Couplings` — the groups of coupled layers of a model, and why others stay whole.
* :class:`Group` — layers tied by their channels; a :data:`unit <Group.units>` is what goes at once (a channel, one dimension of
  every attention head, a head, a hidden unit in both directions).
* :func:`cut` — a copy of a model without given units; :func:`survivors` — what such cuts leave of each tensor.

A residual sum ties the outputs of all its branches; this is found by torch-pruning's dependency graph (Fang et al., "DepGraph:
Towards Any Structural Pruning", CVPR 2023). Groups that it follows wrongly are found by trying them, and stay whole.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch_pruning.dependency import DependencyGraph

from workbench.compress.recurrent import RECURRENT, RecurrentPruner
from workbench.compress.standins import traceable
from workbench.compress.surgery import attention_heads, plain_attributes, refresh_attention, tensors_of
from workbench.errors import ModelError, WorkbenchError

Cuts = list[tuple[str, bool, list[int]]]
"""Pruning steps: (root layer, whether its outputs are cut, channels of it to remove)."""

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, *RECURRENT)


@dataclass(frozen=True)
class Group:
    """Layers whose channels go together."""

    name: str
    """The layer whose channels number the others'."""
    is_out: bool
    """Whether those are its outputs, or its inputs (after attention)."""
    units: list[tuple[int, ...]]
    """What goes at once: channels of the root layer, one tuple a unit."""
    scope: str
    """Groups of one scope have the same layers in the same order, so that their scores compare (Fang et al., "Isomorphic
    Pruning", ECCV 2024)."""
    layers: tuple[str, ...]
    """Layers whose outputs are cut, in the model's order."""
    step: int = 1
    """Units that go at once so that the channel counts stay multiples of ``round_to``."""
    members: Any = field(default=None, repr=False, compare=False)
    """torch-pruning's group over all channels: (dependency, channels of the target), each with ``root_idxs``."""

    @property
    def channels(self) -> int:
        return sum(map(len, self.units))

    def removable(self, wanted: int, most: float = 1.0) -> int:
        """The most units, not more than ``wanted`` nor than the share ``most``, whose absence leaves a multiple of the step."""
        total = len(self.units)
        left = max(total - wanted, math.ceil(total * (1 - most) - 1e-9), 1)
        left = -(-left // self.step) * self.step
        return max(total - left, 0)


class Couplings:
    """The groups of coupled layers of ``model``, traced on the one sample ``x``.

    Attributes:
        groups: those that can be pruned.
        whole: why other layers stay whole, by the name of their group's first layer.
        model: the copy that was traced; ``Group.members`` are of it.
    """

    def __init__(
        self, model: nn.Module, x: torch.Tensor, ignored: Iterable[str] = (), round_to: int = 1, heads: bool = False
    ) -> None:
        self.source, self.x, self.heads = model, x, heads
        self.model = copy.deepcopy(model)
        self.names = {module: name for name, module in self.model.named_modules()}
        self._sharing = _sharing(self.model)
        self.whole: dict[str, str] = {}
        with explained(model):
            self._graph = _trace(self.model, x)
            order = list(self.names.values())
            candidates = sorted(self._candidates(set(ignored), round_to), key=lambda group: order.index(group.layers[0]))
        self.groups = self._sound(candidates)

    def _candidates(self, ignored: set[str], round_to: int) -> Iterator[Group]:
        graph, heads = self._graph, attention_heads(self.model)
        places = {name: place for place, name in enumerate(self.names.values())}
        visited: set[nn.Module] = set()
        for module in list(graph.module2node):
            if not isinstance(module, _ROOTS) or module in visited:
                continue
            pruner = graph.get_pruner_of_module(module)
            if pruner.get_out_channels(module) == 1:
                self.whole[self.names[module]] = "it has one channel"
                continue
            members = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(pruner.get_out_channels(module))))
            made = [(dep, idxs) for dep, idxs in members if graph.is_out_channel_pruning_fn(dep.handler)]
            outs = [dep.target.module for dep, _ in made if isinstance(dep.target.module, nn.Module)]
            visited |= {dep.target.module for dep, idxs in made if len(idxs) == _width(graph, dep)}
            layers = tuple(sorted({self.names[layer] for layer in outs if layer in self.names}, key=places.__getitem__))
            name = layers[0]
            if any(not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler) for dep, _ in members):
                self.whole[name] = "its channels are outputs of the model"
                continue
            if ignored.intersection(layers):
                self.whole[name] = "ignored"
                continue
            if (torn := self._torn(members)) is not None:
                self.whole[name] = f"it shares a weight with {torn}, which would lose other channels"
                continue
            attended = [layer for layer in outs if layer in heads]
            if attended:
                found = self._downstream(members)
                if found is None:
                    self.whole[name] = "its attention block has no layer after it"
                    continue
                members = found
            root, channels = members[0].dep.target.module, len(members[0].idxs)
            count = max(heads[layer] for layer in attended) if attended else 1
            groups = math.lcm(count, *(self._channel_groups(dep) for dep, _ in members))
            if channels % groups:
                self.whole[name] = f"its {channels} channels don't divide into {groups} groups"
                continue
            size = channels // groups
            if attended and self.heads:
                units = [tuple(range(head * size, (head + 1) * size)) for head in range(groups)]
            else:
                units = [tuple(index + group * size for group in range(groups)) for index in range(size)]
            # Attention kernels run by the head's width; other layers by their channels.
            step = 1 if attended and self.heads else round_to if attended else round_to // math.gcd(round_to, groups)
            group = Group(
                self.names[root],
                bool(graph.is_out_channel_pruning_fn(members[0].dep.handler)),
                units,
                self._scope(members),
                layers,
                step,
                members,
            )
            if group.removable(len(units)):
                yield group
            elif groups > 1:
                kind = "heads or directions" if attended or isinstance(root, RECURRENT) else "groups (GroupNorm, grouped layers)"
                self.whole[name] = (
                    f"its {channels} channels are in {groups} {kind} of {size}, and round_to={round_to} leaves none to remove"
                )
            else:
                self.whole[name] = f"it has {channels} channels, and round_to={round_to} leaves none to remove"

    def _torn(self, members: Any) -> str | None:
        """A layer that shares a parameter with one of ``members``, and doesn't lose the same of it."""
        lost: dict[nn.Module, set[tuple[int, int, int]]] = {}
        for item in members.items:
            layer, out = item.dep.target.module, self._graph.is_out_channel_pruning_fn(item.dep.handler)
            if layer in self._sharing:
                axis = int(out == isinstance(layer, nn.Embedding | nn.modules.conv._ConvTransposeNd))
                lost.setdefault(layer, set()).update((axis, *pair) for pair in zip(item.idxs, item.root_idxs, strict=True))
        for layer, rows in lost.items():
            for other in self._sharing[layer]:
                if lost.get(other) != rows:
                    return self.names[other]
        return None

    def _downstream(self, members: Any) -> Any:
        """The group as numbered by the layer after attention: q, k and v share its numbers, head by head."""
        for dep, idxs in reversed(members.items):
            if isinstance(dep.target.module, _ROOTS) and self._graph.is_in_channel_pruning_fn(dep.handler):
                return self._graph.get_pruning_group(dep.target.module, dep.handler, list(range(len(idxs))))
        return None

    def _channel_groups(self, dep: Any) -> int:
        layer, out = dep.target.module, self._graph.is_out_channel_pruning_fn(dep.handler)
        if isinstance(layer, nn.modules.conv._ConvNd):
            return 1 if layer.groups == layer.out_channels else layer.groups
        if isinstance(layer, nn.GroupNorm):
            return layer.num_groups
        if isinstance(layer, nn.MultiheadAttention):
            return layer.num_heads
        if isinstance(layer, RECURRENT) and out:
            return 2 if layer.bidirectional else 1
        return 1

    def _scope(self, members: Any) -> str:
        def tag(module: Any, out: bool) -> str:
            return f"{type(module).__name__}.{'out' if out else 'in'}"

        graph = self._graph
        return " ".join(
            tag(dep.source.module, out) + ">" + tag(dep.target.module, out)
            for dep, _ in members
            for out in [graph.is_out_channel_pruning_fn(dep.handler)]
        )

    def _sound(self, groups: list[Group]) -> list[Group]:
        """Those groups without a step's units of which the model still runs."""
        if not groups or self._runs(groups):
            return groups
        sound = []
        for group in groups:
            if self._runs([group]):
                sound.append(group)
            else:
                self.whole[group.layers[0]] = "its coupling can't be followed: without some of its channels the model doesn't run"
        if sound and not self._runs(sound):
            raise ModelError(
                f"{type(self.source).__name__} can't be pruned by channels: how its layers are coupled can't be followed.",
                "Quantize it instead, or ignore the layers that are rearranged between windows or branches.",
            )
        return sound

    def _runs(self, groups: list[Group]) -> bool:
        history = [(group.name, group.is_out, [c for unit in group.units[: group.step] for c in unit]) for group in groups]
        history = [cuts for cuts, group in zip(history, groups, strict=True) if group.removable(group.step)] or history
        try:
            with explained(self.source), torch.no_grad():
                trial = cut(self.source, self.x, history, self.heads)
                if any(min(parameter.shape, default=1) < 1 for parameter in trial.parameters()):
                    return False
                expected, found = _leaves(self.source(self.x)), _leaves(trial(self.x))
        except ModelError:
            return False
        return [leaf.shape for leaf in expected] == [leaf.shape for leaf in found]


class _Graph(DependencyGraph):  # type: ignore[misc]
    """A dependency graph that knows broadcasting and tables.

    One channel (an attention weight, a gate) times many isn't tied to them, and neither is a table of fewer columns that is
    added to what the channels gave (a bias for each attention head).
    """

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: Any) -> Any:
        group = super().get_pruning_group(module, pruning_fn, idxs)
        channels = _width(self, group[0].dep) or 1

        def tied(dep: Any) -> bool:
            width = _width(self, dep)
            if isinstance(dep.target.module, nn.Parameter):
                return width is not None and width >= channels
            return width != 1 or channels == 1

        group._group = [item for item in group.items if tied(item.dep)]
        return group


def _sharing(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The layers that hold a parameter of another layer, and which those are."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    found: dict[nn.Module, list[nn.Module]] = {}
    for layers in owners.values():
        for layer in layers if len(layers) > 1 else ():
            found.setdefault(layer, []).extend(other for other in layers if other is not layer)
    return found


def _width(graph: DependencyGraph, dep: Any) -> int | None:
    width = graph.get_out_channels if graph.is_out_channel_pruning_fn(dep.handler) else graph.get_in_channels
    found: int | None = width(dep.target)
    return found


def _trace(model: nn.Module, x: torch.Tensor) -> _Graph:
    """The dependency graph of ``model``; frozen layers count too, so gradients are switched on."""
    graph = _Graph()
    pruners = {kind: RecurrentPruner() for kind in RECURRENT}
    with traceable(model):
        graph.build_dependency(model, x, customized_pruners=pruners)
    return graph


def _release(graph: _Graph) -> None:
    """Let go of the model: the graph's nodes hold one another, and would keep it until garbage is collected."""
    for node in graph.module2node.values():
        node.inputs, node.outputs, node.dependencies = [], [], []
    graph.module2node = {}


def cut(source: nn.Module, x: torch.Tensor, cuts: Cuts, heads: bool = False) -> nn.Module:
    """A copy of ``source`` without the channels of ``cuts``.

    Args:
        x: one sample (1, ...).
        heads: attention loses whole heads, else dimensions of every head.
    """
    model = copy.deepcopy(source)
    with explained(source):
        graph = _trace(model, x)
        graph.load_pruning_history([list(step) for step in cuts])
        _release(graph)
    refresh_attention(model, source, heads)
    return model


def survivors(
    source: nn.Module, x: torch.Tensor, cuts: Cuts, heads: bool = False
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What ``cuts`` leave of each layer, and of each tensor the flat positions of the elements that stay.

    The cuts are made on a copy in which every element's value is its own position.
    """
    coded = copy.deepcopy(source)
    with explained(source):
        graph = _trace(coded, x)
        for parameter in coded.parameters():
            parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        for buffer in coded.buffers():
            buffer.data = torch.arange(buffer.numel()).view(buffer.shape)
        graph.load_pruning_history([list(step) for step in cuts])
        _release(graph)
    refresh_attention(coded, source, heads)
    layers: dict[str, Any] = {}
    positions: dict[str, torch.Tensor] = {}
    for name, module in source.named_modules():
        changed = coded.get_submodule(name)
        attributes = {key: value for key, value in plain_attributes(changed) if value != getattr(module, key, None)}
        shapes = {}
        for key, old in tensors_of(module):
            new = getattr(changed, key)
            if new.shape != old.shape:
                shapes[key] = list(new.shape)
                positions[f"{name}.{key}" if name else key] = new.detach().long().cpu()
        if attributes or shapes:
            layers[name] = {"attributes": attributes, "shapes": shapes, **_kept(module, changed)}
    return layers, positions


def _kept(before: nn.Module, after: nn.Module) -> dict[str, list[int]]:
    """Output and input channels of the original that stayed, from a weight whose values are flat positions."""
    old, codes = getattr(before, "weight", None), getattr(after, "weight", None)
    if not isinstance(old, torch.Tensor) or not isinstance(codes, torch.Tensor):
        return {}
    flat = codes.detach().long()
    kept = {"out": (flat.flatten(1)[:, 0] if flat.dim() > 1 else flat) // old[0].numel()}
    if flat.dim() > 1 and flat.shape[1] != old.shape[1]:
        kept["in"] = flat[0].flatten(1)[:, 0] % old[0].numel() // old[0, 0].numel() if flat.dim() > 2 else flat[0] % old.shape[1]
    return {key: index.tolist() for key, index in kept.items() if key == "in" or len(index) != len(old)}


def _leaves(output: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Errors of the dependency graph, in words."""
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            # Parameters outside layers (position embeddings) are announced; the library's choice of their dimension is right.
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            yield
    except WorkbenchError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} can't be pruned by channels: {type(error).__name__}: {error}.",
            "Its layers are coupled in a way that can't be followed: quantize it, or ignore them.",
        ) from error
