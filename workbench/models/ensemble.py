"""Several models as one: their mean probabilities. More accurate than each, and a teacher for a single one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import ModelError
from workbench.models import ModelConfig, Structure, build_model, structure_of


class Ensemble(nn.Module):
    """Inputs of its members -> logits [B, classes]: the logarithm of the members' mean probabilities."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Any) -> Tensor:
        each = torch.stack([member(x).float().log_softmax(-1) for member in self.members])
        return each.logsumexp(0) - math.log(len(self.members))


def ensemble(members: Sequence[Mapping[str, Any]]) -> Ensemble:
    """The factory behind a saved ensemble: ``members`` are the settings of each (:class:`ModelConfig`)."""
    return Ensemble(build_model(ModelConfig(**member)) for member in members)


def ensemble_of(models: Sequence[nn.Module]) -> Ensemble:
    """Trained classifiers of the same classes as one model, which can be saved; the given ones are shared, not copied.

    Raises:
        ModelError: no model, or one that was pruned, quantized, or built elsewhere.
    """
    if not models:
        raise ModelError("An ensemble of no models.", "Pass at least one.")
    for model in models:
        if structure_of(model).model is None or structure_of(model).transforms:
            raise ModelError(
                f"This {type(model).__name__} can't join an ensemble: it isn't as a name builds it.",
                "Take models built by name, before they are pruned or quantized.",
            )
    joined = Ensemble(models)
    settings = ModelConfig(
        name="workbench.models.ensemble:ensemble", args={"members": [structure_of(model).model for model in models]}
    )
    joined.structure = Structure(model=settings.model_dump(mode="json"))  # type: ignore[assignment]
    return joined
