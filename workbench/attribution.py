"""Attributions: which parts of an input speak for an output, by Captum.

* :func:`explain` — a tensor of credits, shaped like the input.
* methods (``attribution_config.METHODS``) — by gradients (integrated gradients, saliency, input × gradient, Grad-CAM) or by
  taking parts away (occlusion, feature ablation). Quantized graphs have no gradients: only the latter explain them.

Inputs are images (N, C, H, W), features (N, F), sequences (N, L, F), or token ids (N, L) in int64, whose credits are those of
their embeddings, summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.attribution_config import METHODS, AttributionConfig
from workbench.errors import ConfigError, ModelError

__all__ = ["METHODS", "AttributionConfig", "explain"]

Model = Callable[[Tensor], Tensor]
"""A module, or any function from inputs (N, ...) to outputs (N, classes); gradients through layers need the module."""


def explain(
    model: Model,
    x: Tensor,
    target: Tensor | int | None = None,
    method: str = "integrated_gradients",
    config: AttributionConfig | None = None,
) -> Tensor:
    """What each part of ``x`` did for one of the model's outputs; the model is asked in evaluation mode and stays as it is.

    Args:
        model: gives outputs (N, classes). Any callable will do for occlusion and feature ablation.
        x: inputs (N, ...), on the model's device.
        target: class whose output is explained, one or one a sample (N,); by default the one that the model prefers.
        method: a name of :data:`METHODS`, or ``"file.py:function"``.
        config: steps, patches, baseline.

    Returns:
        Credits of x's shape; of Grad-CAM (N, 1, H, W). Those of integrated gradients sum to the output's difference between ``x``
        and the baseline.

    Raises:
        ConfigError: a target outside the classes, or a method that this input doesn't take.
        ModelError: the model has no gradients, or not the layer that the method asks for.

    Sources: Sundararajan et al. 2017 (arXiv:1703.01365); Simonyan et al. 2013 (arXiv:1312.6034); Selvaraju et al. 2017
    (arXiv:1610.02391); Zeiler and Fergus 2013 (arXiv:1311.2901).
    """
    config = config or AttributionConfig()
    attribute = METHODS.factory(method)
    found = []
    with _evaluating(model):
        for start in range(0, len(x), config.batch_size):
            part = x[start : start + config.batch_size].detach()
            chosen = target[start : start + config.batch_size] if isinstance(target, Tensor) and target.dim() else target
            found.append(attribute(model, part, _targets(model, part, chosen), config).detach())
    return torch.cat(found) if found else torch.zeros_like(x, dtype=torch.get_default_dtype())


# By gradients ------------------------------------------------------------------------------------------------------------


def integrated_gradients(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """Gradients summed along the straight path from the baseline (Sundararajan et al. 2017)."""
    from captum.attr import IntegratedGradients, LayerIntegratedGradients

    settings = {"target": target, "n_steps": config.steps, "internal_batch_size": max(config.batch_size, len(x))}
    with _gradients(model):
        if _is_ids(x):
            baseline = torch.full_like(x, int(config.baseline))
            layered = LayerIntegratedGradients(model, _embedding(model, x))
            return _whole(layered.attribute(x, baselines=baseline, **settings)).sum(-1)
        return _whole(IntegratedGradients(model).attribute(x, baselines=config.baseline, **settings))


def saliency(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """How steep the output is in each input: the gradient's size (Simonyan et al. 2013); over a token's embedding, its norm."""
    from captum.attr import LayerGradientXActivation, Saliency

    with _gradients(model):
        if _is_ids(x):
            layered = LayerGradientXActivation(model, _embedding(model, x), multiply_by_inputs=False)
            return _whole(layered.attribute(x, target=target)).norm(dim=-1)
        return _whole(Saliency(model).attribute(x.clone().requires_grad_(), target=target))


def input_x_gradient(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """The input times its gradient: the output's linear part."""
    from captum.attr import InputXGradient, LayerGradientXActivation

    with _gradients(model):
        if _is_ids(x):
            return _whole(LayerGradientXActivation(model, _embedding(model, x)).attribute(x, target=target)).sum(-1)
        return _whole(InputXGradient(model).attribute(x.clone().requires_grad_(), target=target))


def gradcam(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """Where a convolution's channels speak for the output, (N, 1, H, W) (Selvaraju et al. 2017)."""
    from captum.attr import LayerGradCam

    if x.dim() != 4:
        raise ConfigError(f"gradcam is for images (N, C, H, W), and this input is {list(x.shape)}.", "Use integrated_gradients.")
    layer = _convolution(model, x, config.layer)
    with _gradients(model):
        found = _whole(LayerGradCam(model, layer).attribute(x, target=target, relu_attributions=True))
    return nn.functional.interpolate(found, x.shape[-2:], mode="bilinear", align_corners=False)


# By taking away ----------------------------------------------------------------------------------------------------------


def occlusion(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """What the output loses when a patch of the image, a step of the sequence, a token or a feature is taken away.

    Every value of a patch carries the patch's whole credit.
    """
    return _ablated(model, x, target, config, patches_of(x, config.patches))


def feature_ablation(model: Model, x: Tensor, target: Tensor, config: AttributionConfig) -> Tensor:
    """What the output loses when a single value is taken away: one call a value, so for small inputs."""
    return _ablated(model, x, target, config, None)


def patches_of(x: Tensor, count: int) -> Tensor | None:
    """Numbers of the parts that occlusion takes away, in a shape that broadcasts to ``x``; None: every value is one.

    Of images (N, C, H, W), at most ``count`` × ``count`` patches through all channels; of sequences (N, L, F), the steps.
    """
    if x.dim() == 3:
        return torch.arange(x.shape[1], device=x.device).reshape(1, -1, 1)
    if x.dim() < 4:
        return None
    rows, columns = (torch.arange(size, device=x.device) * min(count, size) // size for size in x.shape[-2:])
    grid = rows[:, None] * min(count, x.shape[-1]) + columns
    return grid.reshape(*[1] * (x.dim() - 2), *grid.shape)


def _ablated(model: Model, x: Tensor, target: Tensor, config: AttributionConfig, mask: Tensor | None) -> Tensor:
    from captum.attr import FeatureAblation

    baseline = torch.full_like(x[:1], config.baseline)
    with torch.no_grad():
        found = FeatureAblation(model).attribute(
            x,
            baselines=baseline,
            target=target,
            feature_mask=mask,
            perturbations_per_eval=max(1, config.batch_size // len(x)),
        )
    return _whole(found)


# Reading the model -------------------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _gradients(model: Model) -> Iterator[None]:
    try:
        with torch.enable_grad():
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "grad" not in str(error) and "autograd" not in str(error).lower():
            raise
        raise ModelError(
            f"This {type(model).__name__} has no gradients to explain it by: it is quantized or compiled.",
            'Use method="occlusion", which only asks for outputs.',
        ) from error


def _targets(model: Model, x: Tensor, target: Any) -> Tensor:
    """One class a sample (N,)."""
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"The model gives {found} for {len(x)} samples.", "Explain a model with outputs (N, classes).")
    if target is None:
        return output.argmax(1)
    chosen = torch.as_tensor(target, device=x.device).expand(len(x)).long()
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < output.shape[1]:
        raise ConfigError(f"target={target} is none of the {output.shape[1]} classes.", f"Take 0 … {output.shape[1] - 1}.")
    return chosen


def _is_ids(x: Tensor) -> bool:
    return not x.is_floating_point()


def _embedding(model: Model, x: Tensor) -> nn.Module:
    """The first embedding that the model gives its ids to."""
    for layer in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(layer, nn.Embedding) and layer.num_embeddings > int(x.max()):
            return layer
    raise ModelError("Token ids are explained through an embedding, and this model has none.", 'Use method="occlusion".')


def _convolution(model: Model, x: Tensor, name: str) -> nn.Module:
    """The named layer; without a name, the last convolution whose output is more than a point."""
    if not isinstance(model, nn.Module):
        raise ModelError("gradcam looks into layers, and this isn't a module.", 'Use method="occlusion".')
    if name:
        try:
            return model.get_submodule(name)
        except AttributeError:
            raise ConfigError(f"There is no layer {name!r}.", "Name one of model.named_modules().") from None
    seen: list[nn.Module] = []

    def note(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.shape[-1] * output.shape[-2] > 1:
            seen.append(layer)

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ModelError(
            "gradcam needs a convolution with a map as output, and there is none.", "Name a layer, or use occlusion."
        )
    return seen[-1]


def _whole(found: Any) -> Tensor:
    """Captum's answer as a tensor: a layer's comes in a tuple when the layer's output does."""
    tensor: Tensor = found[0] if isinstance(found, tuple) else found
    return tensor
