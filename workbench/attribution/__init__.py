"""Attributions: which parts of an input speak for an output, and which layers, by Captum.

* :func:`explain` — a tensor of credits, shaped like the input.
* methods (:data:`METHODS`) — by gradients (integrated gradients, GradientSHAP, saliency, input × gradient, Grad-CAM; smoothed by
  noise if asked to) or by taking parts away (occlusion, feature ablation). Quantized graphs have no gradients: only the latter
  explain them.
* :func:`explain_layers` — how much of the output flows through each layer, and how much the output heeds it.
* :func:`explain_samples` — :class:`Explanations`, which show themselves: images, texts, tables, series.
* :func:`most_wrong` — those of the samples that a model is most wrong about; :func:`pick_samples` — those at given places.
* :func:`moved` — whether pruning or quantization changed what a model looks at.

Inputs are images (N, C, H, W), features (N, F), sequences (N, L, F), or token ids (N, L) in int64, whose credits are those of
their embeddings, summed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "METHODS": "workbench.attribution_config",
    "AttributionConfig": "workbench.attribution_config",
    "explain": "workbench.attribution.crediting",
    "explain_layers": "workbench.attribution.layers",
    "explain_samples": "workbench.attribution.explanation",
    "Explanation": "workbench.attribution.explanation",
    "Explanations": "workbench.attribution.explanation",
    "Names": "workbench.attribution.explanation",
    "most_wrong": "workbench.attribution.mistakes",
    "pick_samples": "workbench.attribution.mistakes",
    "moved": "workbench.attribution.changes",
    "Movement": "workbench.attribution.changes",
    "patches_of": "workbench.attribution.windows",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from workbench.attribution.changes import Movement, moved
    from workbench.attribution.crediting import explain
    from workbench.attribution.explanation import Explanation, Explanations, Names, explain_samples
    from workbench.attribution.layers import explain_layers
    from workbench.attribution.mistakes import most_wrong, pick_samples
    from workbench.attribution.windows import patches_of
    from workbench.attribution_config import METHODS, AttributionConfig


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'workbench.attribution' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
