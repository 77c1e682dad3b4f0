"""Whether a changed model decides by the same parts of its inputs: credits before and after pruning, quantization or training.

* :func:`moved` — explains the same samples by both models, for the class that the first one prefers.
* :class:`Movement` — a row a sample, their means, and what chance alone would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.attribution.agreement import chance_cosine, cosine, overlap, patch_means, ranks
from workbench.attribution.calls import Model, evaluating, has_gradients, outputs_of, part_of, targets_of
from workbench.attribution.crediting import explain
from workbench.attribution_config import AttributionConfig, card_of
from workbench.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Movement:
    """How far the credits of samples moved; shows itself in a notebook."""

    samples: pd.DataFrame
    """A row a sample, the one that moved most first: ``sample``, its place; ``answer`` and ``new_answer``; ``cosine``, ``rank``
    (Spearman's correlation) and ``overlap`` (share of the largest parts in common) of its credits before and after; cosine and
    overlap with what they would be ``by_chance``, were the parts of the second map shuffled (a rank correlation would be 0);
    ``cosine_of_another``: with the credits that the changed model gives another sample, absent where there is only one."""
    method: str
    parts: int
    """Patches, steps, tokens or columns that were compared."""
    largest: int
    """How many of them ``overlap`` looks at."""
    note: str = ""
    """Why another method was taken than the one asked for."""

    @property
    def mean(self) -> pd.Series[float]:
        """Means over the samples."""
        return self.samples.drop(columns=["sample", "answer", "new_answer"]).mean()

    def __repr__(self) -> str:
        mean, count = self.mean, len(self.samples)
        others = f"; with another sample's {mean.cosine_of_another:.2f}" if "cosine_of_another" in mean else ""
        changed = int((self.samples.answer != self.samples.new_answer).sum())
        words = (
            f"By {self.method.replace('_', ' ')}, over {count} sample{'s' if count != 1 else ''} of {self.parts} parts: "
            f"mean cosine {mean.cosine:.2f} (by chance {mean.cosine_by_chance:.2f}{others}), "
            f"rank correlation {mean['rank']:.2f} (by chance 0), "
            f"{100 * mean.overlap:.0f} % of the {self.largest} largest parts in common "
            f"(by chance {100 * mean.overlap_by_chance:.0f} %); "
            f"{changed} answer{'s' if changed != 1 else ''} changed."
        )
        return f"{words} {self.note}".strip()

    def _repr_html_(self) -> str:
        table = self.samples.style.hide(axis="index").format(precision=2).to_html()
        return f"<p>{escape(repr(self))}</p>{table}"


def moved(
    before: Model,
    after: Model,
    x: Tensor,
    target: Tensor | int | None = None,
    method: str = "integrated_gradients",
    config: AttributionConfig | None = None,
    largest: float = 0.2,
) -> Movement:
    """Compare the credits that two models give the parts of the same samples.

    Args:
        before, after: give outputs (N, classes) for the same inputs.
        x: samples (N, ...), on the models' device.
        target: class whose output is explained, one or one a sample (N,); by default the one that ``before`` prefers.
        method: by which; where it needs gradients and a model has none, occlusion is taken for both, and the result says so.
        config: of the method; ``patches`` are the parts of an image that are compared.
        largest: share of the parts that count as the largest, for their overlap.

    Raises:
        DataError: there are no samples.
        ConfigError, ModelError: as by :func:`~workbench.attribution.explain`.
    """
    import pandas as pd

    config = AttributionConfig.checked(config)
    if not len(x):
        raise DataError("There are no samples to explain.", "Pass at least one.")
    note = ""
    if card_of(method).get("gradients", True) and (lacking := _without_gradients(before, after, x)):
        note = f"{lacking} has no gradients, as a quantized graph: both are explained by occlusion, not by {method}."
        method = "occlusion"
    answers, chosen = _answers(before, x, target, config)
    new_answers, _ = _answers(after, x, None, config)
    maps = [_parts(explain(model, x, chosen, method, config), config.patches) for model in (before, after)]
    parts = maps[0].shape[1]
    count = max(1, round(largest * parts))
    rows = []
    for i, (one, other) in enumerate(zip(*maps, strict=True)):
        row = {
            "sample": i,
            "answer": int(answers[i]),
            "new_answer": int(new_answers[i]),
            "cosine": cosine(one, other),
            "cosine_by_chance": chance_cosine(one, other),
            "rank": cosine(ranks(one), ranks(other)),
            "overlap": overlap(one, other, count),
            "overlap_by_chance": count / parts,
        }
        if len(x) > 1:
            row["cosine_of_another"] = cosine(one, maps[1][(i + 1) % len(x)])
        rows.append(row)
    samples = pd.DataFrame(rows).sort_values("cosine", kind="stable").reset_index(drop=True)
    return Movement(samples, method, parts, count, note)


def _without_gradients(before: Model, after: Model, x: Tensor) -> str:
    lacking = [name for name, model in (("the first model", before), ("the second", after)) if not has_gradients(model, x)]
    words = " and ".join(lacking)
    return words[:1].upper() + words[1:]


def _answers(model: Model, x: Tensor, target: Tensor | int | None, config: AttributionConfig) -> tuple[Tensor, Tensor]:
    """The classes that the model prefers, and those to explain, each (N,)."""
    preferred, chosen = [], []
    with evaluating(model):
        for start in range(0, len(x), config.batch_size):
            part = slice(start, start + config.batch_size)
            output = outputs_of(model, x[part])
            preferred.append(output.argmax(1))
            chosen.append(targets_of(output, part_of(target, part)))
    return torch.cat(preferred), torch.cat(chosen)


def _parts(credits: Tensor, patches: int) -> Tensor:
    """(N, parts): what is compared, on the CPU."""
    return torch.stack([patch_means(one[None].float(), patches).flatten() for one in credits])
