"""The verb: credits of inputs, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workbench.attribution.calls import Model, evaluating, is_ids, outputs_of, part_of, targets_of
from workbench.attribution_config import METHODS, AttributionConfig, card_of
from workbench.errors import ConfigError


def explain(
    model: Model,
    x: Tensor,
    target: Tensor | int | None = None,
    method: str = "integrated_gradients",
    config: AttributionConfig | None = None,
    background: Tensor | None = None,
) -> Tensor:
    """What each part of ``x`` did for one of the model's outputs; the model is asked in evaluation mode and stays as it is.

    Args:
        model: gives outputs (N, classes). Any callable will do for occlusion and feature ablation.
        x: inputs (N, ...), on the model's device.
        target: class whose output is explained, one or one a sample (N,); by default the one that the model prefers.
        method: a name of :data:`METHODS`, or ``"file.py:function"``.
        config: steps, windows, baseline, noise, draws.
        background: samples (M, ...) to draw baselines from (gradient_shap), on the model's device.

    Returns:
        Credits of x's shape; of Grad-CAM (N, 1, H, W). Those of integrated gradients sum to the output's difference between ``x``
        and the baseline; those of GradientSHAP, in expectation, to its difference from the mean over the baselines.

    Raises:
        ConfigError: a target outside the classes, or a method or setting that this input doesn't take.
        ModelError: the model has no gradients, or not the layer that the method asks for.
    """
    config = AttributionConfig.checked(config)
    attribute = _method(method, background)
    smoothed = config.noise > 0 and not card_of(method).get("own_draws")
    if smoothed and is_ids(x):
        raise ConfigError(
            f"noise={config.noise:g} is added to numbers, and these inputs are token ids.",
            "Leave it out, or use gradient_shap, which adds it to their embeddings.",
        )
    found = []
    with evaluating(model):
        for start in range(0, len(x), config.batch_size):
            part = x[start : start + config.batch_size].detach()
            chosen = targets_of(outputs_of(model, part), part_of(target, slice(start, start + config.batch_size)))
            credits = _smoothed(attribute, model, part, chosen, config) if smoothed else attribute(model, part, chosen, config)
            found.append(credits.detach())
    return torch.cat(found) if found else torch.zeros_like(x, dtype=torch.get_default_dtype())


def _method(name: str, background: Tensor | None) -> Callable[..., Tensor]:
    attribute = METHODS.factory(name)
    if background is None:
        return attribute
    if "background" not in inspect.signature(attribute).parameters:
        raise ConfigError(f"{name} draws no baselines from background samples.", "Leave them out, or use gradient_shap.")
    return partial(attribute, background=background)


def _smoothed(attribute: Callable[..., Tensor], model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """The mean of credits over noisy copies, whose noise is the same for every sample (Smilkov et al. 2017, arXiv:1706.03825)."""
    chance = torch.Generator().manual_seed(config.seed)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for _ in range(config.draws):
        noise = torch.randn(x.shape[1:], generator=chance, dtype=torch.float64).to(x)
        total = total + attribute(model, x + config.noise * noise, target, config).detach()
    return total / config.draws
