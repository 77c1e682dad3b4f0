"""Bringing layers to recorded sizes. Rebuilding a pruned model needs nothing else.

* :func:`reshaped` / :func:`replay` — a model brought to recorded shapes.
* :func:`attention_heads` / :func:`refresh_attention` — the sizes that attention blocks keep beside their layers.
* :func:`config_sizes` — those in the ``config`` of a model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


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


def replay(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Give a freshly built ``model`` the shapes that ``record`` describes; its weights are yet to be loaded."""
    set_config(model, record.get("sizes", {}))
    return reshaped(model, record["layers"], lambda name, old, shape: old.new_zeros(shape))


def config_sizes(before: nn.Module, after: nn.Module) -> dict[str, int]:
    """Fields of a transformers ``config`` that have another value now; a size that differs between layers keeps the old one.

    Args:
        before: a model, of which some module has a ``config``.
        after: the same, pruned.
    """
    configs = (getattr(module, "config", None) for module in before.modules())
    config: Any = next((found for found in configs if hasattr(found, "hidden_size")), None)
    if config is None:
        return {}
    found: dict[str, set[int]] = {"hidden_size": set(), "intermediate_size": set(), "num_attention_heads": set()}
    for name, module in before.named_modules():
        now = after.get_submodule(name)
        if isinstance(module, nn.Embedding) and module.embedding_dim == config.hidden_size:
            found["hidden_size"].add(now.embedding_dim)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear) and module.out_features == getattr(config, "intermediate_size", None):
            found["intermediate_size"].add(now.out_features)  # type: ignore[arg-type]
        elif isinstance(heads := getattr(now, "num_attention_heads", None), int):
            found["num_attention_heads"].add(heads)
    return {
        field: min(sizes)
        for field, sizes in found.items()
        if len(sizes) == 1 and hasattr(config, field) and sizes != {getattr(config, field)}
    }


def set_config(model: nn.Module, sizes: dict[str, int]) -> None:
    """Give every ``config`` within ``model`` the ``sizes``."""
    for module in model.modules():
        for field, size in sizes.items():
            if hasattr(config := getattr(module, "config", None), field):
                setattr(config, field, size)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers that a layer keeps beside its tensors: ``out_channels``, ``groups``, ``normalized_shape``, ``scale`` …"""
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training" and _is_number(value):
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, tuple | list) and all(isinstance(item, int) for item in value))


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of this layer itself."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


# Attention --------------------------------------------------------------------------------------------------------------


def attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Attention heads by projection layer: each loses the same number of dimensions, or goes whole."""
    return {
        model.get_submodule(f"{name}.{layer}" if name else layer): heads
        for name, heads, layers in _attentions(model)
        for layer in layers
    }


def refresh_attention(model: nn.Module, source: nn.Module, whole_heads: bool = False) -> None:
    """Set the sizes that attention blocks of ``model`` remember to those of its projections, cut from those of ``source``.

    Args:
        whole_heads: heads went whole, so that there are fewer of the same width; else each is narrower.
    """
    for name, heads, layers in _attentions(source):
        block, before = model.get_submodule(name), source.get_submodule(name)
        old, new = (_width(part, layers) for part in (before, block))
        if old == new:
            continue
        dimension = old // heads if whole_heads else new // heads
        sizes = {
            **dict.fromkeys(("num_heads", "num_attention_heads"), new // dimension),
            **dict.fromkeys(("head_dim", "attention_head_size"), dimension),
            **dict.fromkeys(("attn_dim", "all_head_size"), new),
        }
        # The factor of the logits, where it is the usual one.
        for key in ("scale", "scaling"):
            if getattr(before, key, None) == (old // heads) ** -0.5:
                sizes[key] = dimension**-0.5
        for key, value in sizes.items():
            if hasattr(block, key):
                setattr(block, key, value)


def _width(block: nn.Module, layers: tuple[str, ...]) -> int:
    """Features of all heads together."""
    features = getattr(block, layers[0]).out_features
    return int(features) // (3 if len(layers) == 1 else 1)


def _attentions(model: nn.Module) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """(block, heads, projections) of each attention block of the common layouts: qkv in one layer, or q, k, v in three."""
    for name, block in model.named_modules():
        heads = getattr(block, "num_heads", None) or getattr(block, "num_attention_heads", None)
        if not isinstance(heads, int):
            continue
        for layers in (("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")):
            if all(isinstance(getattr(block, layer, None), nn.Linear) for layer in layers):
                yield name, heads, layers
                break
