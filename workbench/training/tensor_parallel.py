"""Layers computed by several ranks together (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053).

Each rank of the mesh's ``tensor`` dimension has all samples of its copy's batch, and a part of the attention heads and of the
width of MLPs: a first layer is divided by ``columns`` (outputs), the layer that takes them by ``rows`` (inputs), and what the
ranks computed is summed after the second. A plan says which layer is divided how: a function from a model to styles by name.

* :func:`divide` carries a plan out, in place, and checks that the model still computes the same.
* :func:`automatic_plan` knows the blocks of timm's and transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn

from workbench.errors import ConfigError, ModelError
from workbench.training.mesh_config import PLANS

STYLES = ("columns", "rows", "heads")
"""``columns``, ``rows``: a linear layer divided by its outputs or inputs. ``heads``: an attention module whose ``qkv`` computes
queries, keys and values at once: every rank keeps all of it and computes its own heads; its ``proj`` is divided by rows."""

TOLERANCE = 1e-3
"""Of the divided model's outputs, relative to the largest: sums are taken in another order, nothing more."""


@dataclass(frozen=True)
class _Pattern:
    """Linear layers that belong together, by their names below a module."""

    columns: tuple[str, ...]
    rows: str
    heads: str | None = None
    """Attribute with the number of attention heads, which aren't to be cut."""

    def found_in(self, module: nn.Module) -> bool:
        layers = [_below(module, name) for name in (*self.columns, self.rows)]
        if not all(type(layer) is nn.Linear for layer in layers):
            return False
        first, last = layers[0], layers[-1]
        between = _below(module, "norm")  # over the divided width
        return first.out_features == last.in_features and (between is None or isinstance(between, nn.Identity))

    def width(self, module: nn.Module) -> int:
        """What must divide by the ranks."""
        return int(_below(module, self.heads) if self.heads else _below(module, self.rows).in_features)


PATTERNS = (
    # transformers: BERT and those that took its layout
    _Pattern(("self.query", "self.key", "self.value"), "output.dense", heads="self.num_attention_heads"),
    _Pattern(("intermediate.dense",), "output.dense"),
    # timm's Mlp; torch's own encoder layer has the second form
    _Pattern(("fc1",), "fc2"),
    _Pattern(("linear1",), "linear2"),
)


def automatic_plan(model: nn.Module) -> dict[str, str]:
    """Styles by name for the attention and MLPs that are known, whatever the number of ranks."""
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if _has_joined_heads(module):
            styles[name] = "heads"
        for pattern in PATTERNS:
            if pattern.found_in(module):
                styles |= dict.fromkeys((prefix + layer for layer in pattern.columns), "columns")
                styles[prefix + pattern.rows] = "rows"
    return styles


def divide(model: nn.Module, plan: str, mesh: Any, example: Any) -> list[str]:
    """Divide a model's layers over the ranks of ``mesh``, in place; every one of them calls it with the same weights.

    Args:
        plan: a name in :data:`PLANS`, or ``module:function``.
        mesh: a one-dimensional device mesh.
        example: a small batch of inputs on the model's device.

    Returns:
        What stays whole, and why.

    Raises:
        ConfigError: the plan names layers or styles that there are not.
        ModelError: nothing can be divided so, or the divided model would compute something else.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = _checked(PLANS.factory(plan)(model), model, plan)
    size = mesh.size()
    whole = _indivisible(model, styles, size) if plan == "auto" else {}
    styles = {name: style for name, style in styles.items() if name not in whole}
    remarks = sorted(set(whole.values()))
    if not styles:
        reason = f" ({'; '.join(remarks)})" if remarks else ""
        raise ModelError(
            f"mesh.tensor={size}: no layer of {type(model).__name__} can be divided{reason}.",
            "Take mesh.shard instead, or give a plan: mesh.plan='file.py:function', from the model to {layer: columns | rows}.",
        )
    before = _outputs(model, example)
    makers = {"columns": ColwiseParallel, "rows": RowwiseParallel}
    for name, style in styles.items():
        if style == "heads":
            _divide_heads(model.get_submodule(name), mesh)
        else:
            parallelize_module(model, mesh, {name: makers[style]()}, src_data_rank=None)
    try:
        after = _outputs(model, example)
    except Exception as error:
        raise ModelError(
            f"Divided by the plan {plan!r} over {size} ranks, {type(model).__name__} fails: {error}", _MEND
        ) from error
    off = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
    if not off < TOLERANCE:
        raise ModelError(
            f"Divided by the plan {plan!r} over {size} ranks, {type(model).__name__} computes something else: outputs differ by "
            f"{off:.2g} of the largest.",
            _MEND,
        )
    return remarks


_MEND = "Divide a layer by columns only where all that follows up to a layer by rows works on each column, or each head, alone."


def _checked(styles: Mapping[str, str], model: nn.Module, plan: str) -> dict[str, str]:
    """A plan's styles by the full names of layers; patterns such as ``blocks.*.fc1`` become those that they match."""
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for pattern, style in styles.items():
        names = [name for name in modules if fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError(f"The plan {plan!r} names the layer {pattern!r}, which the model doesn't have.", "Mend the plan.")
        if style not in STYLES:
            raise ConfigError(f"The plan {plan!r} has the style {style!r} for {pattern!r}.", f"There are {', '.join(STYLES)}.")
        for name in names:
            fits = _has_joined_heads(modules[name]) if style == "heads" else isinstance(modules[name], nn.Linear | nn.Embedding)
            if not fits:
                kind = type(modules[name]).__name__
                raise ConfigError(f"The plan {plan!r} takes {name!r} by {style}, and it is a {kind}.", "Mend the plan.")
            found[name] = style
    return found


def _indivisible(model: nn.Module, styles: Mapping[str, str], size: int) -> dict[str, str]:
    """Layers of the automatic plan whose heads or width don't divide by ``size``, and why."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if styles.get(name) == "heads" and module.num_heads % size:
            found[name] = f"{module.num_heads} attention heads don't divide by {size}"
        for pattern in PATTERNS:
            if pattern.found_in(module) and pattern.width(module) % size:
                what = "attention heads don't" if pattern.heads else "units of an MLP don't"
                reason = f"{pattern.width(module)} {what} divide by {size}"
                found |= dict.fromkeys((prefix + layer for layer in (*pattern.columns, pattern.rows)), reason)
    return found


@torch.no_grad()
def _outputs(model: nn.Module, example: Any) -> Tensor:
    training = model.training
    model.eval()
    try:
        output: Tensor = model(example)
        return output.float()
    finally:
        model.train(training)


def _below(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, None where there is none."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


# -- attention with one layer for queries, keys and values ---------------------------------------------------------------


def _has_joined_heads(module: Any) -> bool:
    """timm's Attention, without what works across heads or shares weights between them."""
    qkv, width = _below(module, "qkv"), _below(module, "attn_dim")
    if type(qkv) is not nn.Linear or type(_below(module, "proj")) is not nn.Linear or width is None:
        return False
    plain = all(isinstance(_below(module, name), nn.Identity | NoneType) for name in ("q_norm", "k_norm", "norm", "gate"))
    return plain and qkv.out_features == 3 * width and width == module.num_heads * module.head_dim


def _divide_heads(attention: Any, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    heads, size = attention.num_heads, mesh.size()
    if heads % size:
        raise ModelError(f"{heads} attention heads don't divide by {size} ranks.", f"Take a mesh.tensor that divides {heads}.")
    mine = torch.arange(3 * attention.attn_dim).view(3, size, -1)[:, mesh.get_local_rank()].flatten()
    attention.qkv.__class__ = _OwnHeads
    attention.qkv.group = mesh.get_group()
    attention.qkv.rows = mine.to(attention.qkv.weight.device)  # no buffer: those are rank 0's on every rank
    attention.num_heads, attention.attn_dim = heads // size, attention.attn_dim // size
    parallelize_module(attention.proj, mesh, RowwiseParallel(), src_data_rank=None)


class _OwnHeads(nn.Linear):
    """The rows of a rank's heads; weights are whole on every rank, so that checkpoints hold them in their own order."""

    group: dist.ProcessGroup
    rows: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., 3 × width / ranks]."""
        summed: Callable[..., Any] = _SummedGradient.apply
        bias = None if self.bias is None else summed(self.bias, self.group)[self.rows]
        return nn.functional.linear(summed(x, self.group), summed(self.weight, self.group)[self.rows], bias)


class _SummedGradient(torch.autograd.Function):
    """A tensor as it is; its gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return collectives.all_reduce(gradients[0].contiguous(), "sum", ctx.group), None
