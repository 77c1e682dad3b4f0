"""The methods by which an output is divided among the inputs: :data:`~workbench.attribution_config.METHODS`.

Each takes (model, x, target, config) and gives credits of x's shape, or of one that broadcasts to it; those of token ids are the
credits of their embeddings, summed. By gradients, all but one are Captum's: its GradientSHAP draws from the global generators, so
that a sample's credits would depend on its batch. Those by taking parts away ask for outputs only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.attribution.calls import Model, convolution_of, embedding_of, gradient_at, gradients_of, is_ids
from workbench.attribution.windows import columns_of, patches_of, window_of
from workbench.attribution_config import AttributionConfig
from workbench.errors import ConfigError

# By gradients ------------------------------------------------------------------------------------------------------------


def integrated_gradients(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """Gradients summed along the straight path from the baseline (Sundararajan et al. 2017)."""
    from captum.attr import IntegratedGradients, LayerIntegratedGradients

    settings = {"target": target, "n_steps": config.steps, "internal_batch_size": max(config.batch_size, len(x))}
    with gradients_of(model):
        if is_ids(x):
            baseline = torch.full_like(x, int(config.baseline))
            layered = LayerIntegratedGradients(model, embedding_of(model, x))
            return _whole(layered.attribute(x, baselines=baseline, **settings)).sum(-1)
        return _whole(IntegratedGradients(model).attribute(x, baselines=config.baseline, **settings))


def gradient_shap(model: Model, x: Tensor, target: Tensor, config: AttributionConfig, background: Tensor | None = None) -> Tensor:
    """Expected gradients: the mean, over baselines and places on the way from them, of (input − baseline) × gradient.

    Baselines are the samples of ``background`` (M, ...) in turns; without it, Gaussian about ``config.baseline``. Places on the
    way are drawn one from each of ``config.draws`` equal parts of it, which keeps them uniform and their mean closer. As many
    draws as background samples, or a multiple, use each equally often. Draws are the same for every sample of ``x``.

    Sources: Lundberg & Lee 2017 (arXiv:1705.07874); Erion et al. 2019 (arXiv:1906.10670).
    """
    chance = torch.Generator().manual_seed(config.seed)
    layer = embedding_of(model, x) if is_ids(x) else None
    with torch.no_grad():
        there = x if layer is None else layer(x)
        known = None if background is None else background if layer is None else layer(background)
        absent = torch.full_like(x[:1], config.baseline)
        absent = absent if layer is None else layer(absent)

    def drawn(scale: float) -> Tensor:
        return scale * torch.randn(there.shape[1:], generator=chance, dtype=torch.float64).to(there)

    order: list[int] = []
    total = torch.zeros_like(there)
    together = max(1, config.batch_size // len(x))
    for first in range(0, config.draws, together):
        inputs, baselines, shares = [], [], []
        for draw in range(first, min(first + together, config.draws)):
            shares.append((draw + torch.rand((), generator=chance, dtype=torch.float64).item()) / config.draws)
            if known is not None and not order:
                order = torch.randperm(len(known), generator=chance).tolist()
            inputs.append(there + drawn(config.noise))
            start = absent + drawn(config.spread) if known is None else known[order.pop()][None]
            baselines.append(start.expand_as(there))
        path = [share * end + (1 - share) * start for share, end, start in zip(shares, inputs, baselines, strict=True)]
        with gradients_of(model):
            count = len(path)
            slopes = gradient_at(model, x.repeat(count, *[1] * (x.dim() - 1)), target.repeat(count), torch.cat(path), layer)
        total += ((torch.cat(inputs) - torch.cat(baselines)) * slopes).unflatten(0, (count, len(x))).sum(0)
    mean = total / config.draws
    return mean if layer is None else mean.sum(-1)


def saliency(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """How steep the output is in each input: the gradient's size (Simonyan et al. 2013); over a token's embedding, its norm."""
    from captum.attr import LayerGradientXActivation, Saliency

    with gradients_of(model):
        if is_ids(x):
            layered = LayerGradientXActivation(model, embedding_of(model, x), multiply_by_inputs=False)
            return _whole(layered.attribute(x, target=target)).norm(dim=-1)
        return _whole(Saliency(model).attribute(x.clone().requires_grad_(), target=target))


def input_x_gradient(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """The input times its gradient: the output's linear part."""
    from captum.attr import InputXGradient, LayerGradientXActivation

    with gradients_of(model):
        if is_ids(x):
            return _whole(LayerGradientXActivation(model, embedding_of(model, x)).attribute(x, target=target)).sum(-1)
        return _whole(InputXGradient(model).attribute(x.clone().requires_grad_(), target=target))


def gradcam(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """Where a convolution's channels speak for the output, (N, 1, H, W) (Selvaraju et al. 2017)."""
    from captum.attr import LayerGradCam

    if x.dim() != 4:
        raise ConfigError(f"gradcam is for images (N, C, H, W), and this input is {list(x.shape)}.", "Use integrated_gradients.")
    layer = convolution_of(model, x, config.layer)
    with gradients_of(model):
        found = _whole(LayerGradCam(model, layer).attribute(x, target=target, relu_attributions=True))
    return nn.functional.interpolate(found, x.shape[-2:], mode="bilinear", align_corners=False)


# By taking away ----------------------------------------------------------------------------------------------------------


def occlusion(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """What the output loses when a part is taken away (Zeiler & Fergus 2013).

    Parts are patches of an image, steps of a sequence, tokens, columns of a table; or ``config.window`` slides over the input;
    or columns go together, by ``config.groups``. Every value of a part carries the part's whole credit.
    """
    if config.window:
        return _slid(model, x, target, config)
    if config.groups:
        return _ablated(model, x, target, config, columns_of(x, config.groups))
    return _ablated(model, x, target, config, patches_of(x, config.patches))


def feature_ablation(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """What the output loses when a single value is taken away: one call a value, so for small inputs."""
    return _ablated(model, x, target, config, None)


def _ablated(model: Model, x: Tensor, target: Tensor, config: AttributionConfig, mask: Tensor | None) -> Tensor:
    from captum.attr import FeatureAblation

    with torch.no_grad():
        found = FeatureAblation(model).attribute(x, feature_mask=mask, **_removal(x, target, config))
    return _whole(found)


def _slid(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    from captum.attr import Occlusion

    shape, strides = window_of(x, config)
    with torch.no_grad():
        found = Occlusion(model).attribute(x, shape, strides=strides, **_removal(x, target, config))
    return _whole(found)


def _removal(x: Tensor, target: Tensor, config: AttributionConfig) -> dict[str, Any]:
    """What takes the place of a part, and of how many parts a call asks, so that it has at most ``config.batch_size`` samples."""
    return {
        "baselines": torch.full_like(x[:1], config.baseline),
        "target": target,
        "perturbations_per_eval": max(1, config.batch_size // len(x)),
    }


def _whole(found: Any) -> Tensor:
    """Captum's answer as a tensor: a layer's comes in a tuple when the layer's output does."""
    tensor: Tensor = found[0] if isinstance(found, tuple) else found
    return tensor
