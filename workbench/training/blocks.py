"""The repeated parts of a model."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, in order: modules of one class, themselves of several layers, that follow one another.

    Residual blocks, transformer layers; none for a model without any.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        repeated = _repeated(module)
        # Stages of one class hold the blocks themselves.
        if any(_repeated(part) for stage in repeated for part in stage.modules()):
            repeated = []
        found.extend(repeated)
        for child in module.children():
            if child not in repeated:
                visit(child)

    visit(model)
    return found


def _repeated(module: nn.Module) -> list[nn.Module]:
    """Of a list of modules, those of several layers that have another of their class beside them."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return []
    kinds = [type(child) for child in module]
    return [child for child in module if kinds.count(type(child)) > 1 and any(True for _ in child.children())]
