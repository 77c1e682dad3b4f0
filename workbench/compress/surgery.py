"""Cutting layers to size, and telling what stayed. Rebuilding a pruned model needs nothing else.

* :func:`survivors` — which elements of each tensor a pruning history leaves.
* :func:`reshaped` / :func:`replay` — a model brought to recorded shapes.
* :func:`attention_heads` / :func:`refresh_attention` — the sizes that attention blocks keep beside their layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workbench.errors import ModelError, WorkbenchError

History = list[tuple[str, bool, list[int]]]
"""Pruning steps: (root layer, whether its outputs were pruned, channels removed)."""


def survivors(source: nn.Module, x: torch.Tensor, history: History) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What ``history`` leaves of each layer, and of each tensor the flat positions of the elements that stay.

    The history is replayed on a copy in which every element's value is its own position.
    """
    import torch_pruning

    coded = copy.deepcopy(source)
    graph = torch_pruning.DependencyGraph()
    with explained(source):
        graph.build_dependency(coded, x)
        for parameter in coded.parameters():
            parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        for buffer in coded.buffers():
            buffer.data = torch.arange(buffer.numel()).view(buffer.shape)
        graph.load_pruning_history(history)
    refresh_attention(coded)
    layers: dict[str, Any] = {}
    positions: dict[str, torch.Tensor] = {}
    for name, module in source.named_modules():
        changed = coded.get_submodule(name)
        attributes = {key: value for key, value in _plain_attributes(changed) if value != getattr(module, key, None)}
        shapes = {}
        for key, old in _tensors(module):
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


def reshaped(
    model: nn.Module, layers: dict[str, Any], content: Callable[[str, torch.Tensor, list[int]], torch.Tensor]
) -> nn.Module:
    """``model`` with the attributes and tensor shapes of ``layers``, the tensors filled by ``content``; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        module = model.get_submodule(name)
        for key, value in layer["attributes"].items():
            setattr(module, key, tuple(value) if isinstance(getattr(module, key, None), tuple) else value)
        for key, shape in layer["shapes"].items():
            old = getattr(module, key)
            if id(old) in done:
                setattr(module, key, done[id(old)])
                continue
            value = content(f"{name}.{key}" if name else key, old, shape).reshape(shape)
            if isinstance(old, nn.Parameter):
                value = done[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(module, key, value)
    return model


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The sizes that a layer keeps beside its tensors: ``out_channels``, ``groups``, ``normalized_shape`` …"""
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training" and _is_size(value):
            yield key, value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple | list) and all(isinstance(item, int) for item in value))


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def replay(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Give a freshly built ``model`` the shapes that ``record`` describes; its weights are yet to be loaded."""
    return reshaped(model, record["layers"], lambda name, old, shape: old.new_zeros(shape))


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Attention heads by projection layer: a head's width is cut alike in all of them."""
    return {layer: heads for _, heads, layers in _attentions(model) for layer in layers}


def refresh_attention(model: nn.Module) -> None:
    """Set the head sizes that an attention block remembers to those of its pruned projections."""
    for block, heads, layers in _attentions(model):
        width = layers[0].out_features // (3 if len(layers) == 1 else 1)
        for name, value in {
            "head_dim": width // heads,
            "attention_head_size": width // heads,
            "attn_dim": width,
            "all_head_size": width,
        }.items():
            if hasattr(block, name):
                setattr(block, name, value)


def _attentions(model: nn.Module) -> Iterator[tuple[nn.Module, int, list[nn.Linear]]]:
    """(block, heads, projections) of each attention block of the common layouts: qkv in one layer, or q, k, v in three."""
    for block in model.modules():
        heads = getattr(block, "num_heads", None) or getattr(block, "num_attention_heads", None)
        if not isinstance(heads, int):
            continue
        for names in (("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")):
            layers = [layer for name in names if isinstance(layer := getattr(block, name, None), nn.Linear)]
            if len(layers) == len(names):
                yield block, heads, layers
                break


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
            "Its layers are coupled in a way that can't be followed, as in shifted windows: quantize it, or ignore them.",
        ) from error
