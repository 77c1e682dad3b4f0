"""Attributions that moved: whether a variant looks at the same parts of an input as what it is compared with.

A variant may agree on every answer and yet decide by something else. Both are explained for the class that the first variant
prefers; the two maps are compared by cosine and by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from workbench.attribution.agreement import cosine, patch_means, ranks
from workbench.attribution.crediting import explain
from workbench.attribution.pictures import picture
from workbench.attribution_config import AttributionConfig, card_of
from workbench.comparison.config import CompareConfig
from workbench.comparison.forms import Form, Variant, deployed_forms
from workbench.comparison.result import Moved

PICTURES = 4
"""Samples of a variant that are kept as pictures: those that moved most."""
PIXELS = 96
"""Longer side of a picture, at most."""


def moved_attributions(
    loaded: Mapping[str, Variant], forms: list[Form], x: Tensor, y: Tensor, positions: list[int], config: CompareConfig
) -> tuple[list[Moved], list[str]]:
    """Every variant but the first against it, the samples that moved most first; and what couldn't be explained.

    Args:
        x: the samples (N, ...) where the forms are; ``y`` their labels, ``positions`` where in the data they are.
    """
    models, notes = _models(loaded, forms, config)
    settings = AttributionConfig(batch_size=config.batch_sizes[-1])
    first, *others = loaded
    if first not in models or not others:
        return [], notes
    answers = models[first](x).argmax(1)
    before = explain(models[first], x, answers, config.attribution_method, settings).float()
    found: list[Moved] = []
    for name in others:
        if name not in models:
            continue
        after = explain(models[name], x, answers, config.attribution_method, settings).float()
        new_answers = models[name](x).argmax(1)
        made = []
        for i, position in enumerate(positions):
            one, other = patch_means(before[i : i + 1], settings.patches), patch_means(after[i : i + 1], settings.patches)
            made.append(
                Moved(
                    variant=name,
                    sample=position,
                    label=int(y[i]),
                    answer=int(answers[i]),
                    new_answer=int(new_answers[i]),
                    cosine=cosine(one.flatten(), other.flatten()),
                    rank=cosine(ranks(one.flatten()), ranks(other.flatten())),
                    before=_rounded(one),
                    after=_rounded(other),
                )
            )
        order = sorted(range(len(made)), key=lambda i: made[i].cosine)
        found += [replace(made[i], picture=picture(x[i], PIXELS) if rank < PICTURES else "") for rank, i in enumerate(order)]
    return found, notes


def _models(
    loaded: Mapping[str, Variant], forms: list[Form], config: CompareConfig
) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """What to explain of each variant: its deployed form, in calls of one size; by gradients, the float model itself."""
    deployed = {name: forms[index] for name, index in deployed_forms(forms).items()}
    if not card_of(config.attribution_method).get("gradients", True):
        return {name: _padded(deployed[name].call, config.batch_sizes[-1]) for name in loaded}, []
    able = [name for name in loaded if loaded[name].quantized is None]
    notes = [
        f"{name} has no gradients: its attributions aren't compared by {config.attribution_method}; occlusion would do."
        for name in loaded
        if name not in able
    ]
    return {name: deployed[name].model for name in able}, notes


def _padded(call: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """The call, always in batches of ``size``: each new size would be compiled anew."""

    def padded(x: Tensor) -> Tensor:
        found = []
        for part in x.split(size):
            filled = torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])])
            found.append(call(filled)[: len(part)].float())
        return torch.cat(found)

    return padded


def _rounded(grid: Tensor) -> list[list[float]]:
    return [[float(f"{value:.3g}") for value in row] for row in grid.tolist()]
