"""Attributions that moved: whether a variant looks at the same parts of an input as what it is compared with.

A variant may agree on every answer and yet decide by something else. Both are explained for the class that the first variant
prefers; the two maps are compared by cosine and by rank.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from workbench.attribution import AttributionConfig, explain, patches_of
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
            one, other = _grid(before[i : i + 1], settings.patches), _grid(after[i : i + 1], settings.patches)
            made.append(
                Moved(
                    variant=name,
                    sample=position,
                    label=int(y[i]),
                    answer=int(answers[i]),
                    new_answer=int(new_answers[i]),
                    cosine=_cosine(one.flatten(), other.flatten()),
                    rank=_cosine(_ranks(one.flatten()), _ranks(other.flatten())),
                    before=_rounded(one),
                    after=_rounded(other),
                )
            )
        order = sorted(range(len(made)), key=lambda i: made[i].cosine)
        found += [replace(made[i], picture=_picture(x[i]) if rank < PICTURES else "") for rank, i in enumerate(order)]
    return found, notes


def _models(
    loaded: Mapping[str, Variant], forms: list[Form], config: CompareConfig
) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """What to explain of each variant: its deployed form, in calls of one size; by gradients, the float model itself."""
    deployed = {name: forms[index] for name, index in deployed_forms(forms).items()}
    if config.attribution_method in ("occlusion", "feature_ablation"):
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


def _grid(credits: Tensor, patches: int) -> Tensor:
    """Mean credit by patch (rows, columns): of an image its patches, of a sequence or features one row."""
    groups = patches_of(credits, patches)
    if groups is None:
        return credits.reshape(1, -1).cpu()
    flat = groups.expand_as(credits).flatten()
    count = int(flat.max()) + 1
    sums = torch.zeros(count, device=credits.device).index_add(0, flat, credits.flatten())
    means = (sums / flat.bincount(minlength=count)).cpu()
    return means.reshape(min(patches, credits.shape[-2]), -1) if credits.dim() >= 4 else means.reshape(1, -1)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two maps; 1 where both are zero everywhere, 0 where one is."""
    a, b = a.double(), b.double()
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else float(torch.equal(a, b))


def _ranks(values: Tensor) -> Tensor:
    """Ranks about their mean, equal values sharing theirs; their cosine is Spearman's correlation."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2


def _rounded(grid: Tensor) -> list[list[float]]:
    return [[float(f"{value:.3g}") for value in row] for row in grid.tolist()]


def _picture(sample: Tensor) -> str:
    """An image (C, H, W) as a small PNG in a data URI; "" for what is no image."""
    if sample.dim() != 3 or not sample.is_floating_point():
        return ""
    from PIL import Image

    image = sample.float().cpu()
    image = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp_min(1e-12) * 255).round().byte().permute(1, 2, 0)
    drawn = Image.fromarray(pixels.squeeze(-1).numpy())
    drawn.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
