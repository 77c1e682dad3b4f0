"""Calling a model that is to be explained: in evaluation mode, with gradients if it has them, through an embedding if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError, ModelError

Model = Callable[[Tensor], Tensor]
"""A module, or any function from inputs (N, ...) to outputs (N, classes); gradients through layers need the module."""


def is_ids(x: Tensor) -> bool:
    """Whether the inputs are token ids rather than numbers."""
    return not x.is_floating_point()


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is as it was."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def gradients_of(model: Model) -> Iterator[None]:
    """Gradients enabled; :class:`ModelError` with the remedy where the model has none."""
    try:
        with torch.enable_grad(), _without_cudnn() if _recurs_on_gpu(model) else nullcontext():
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "grad" not in str(error) and "autograd" not in str(error).lower():
            raise
        raise ModelError(
            f"This {type(model).__name__} has no gradients to explain it by: it is quantized or compiled.",
            'Use method="occlusion", which only asks for outputs.',
        ) from error


def _recurs_on_gpu(model: Model) -> bool:
    recurrent = (m for m in model.modules() if isinstance(m, nn.RNNBase)) if isinstance(model, nn.Module) else ()
    return any(parameter.is_cuda for module in recurrent for parameter in module.parameters())


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """cuDNN's recurrent layers go backward in training mode only; PyTorch's own do in evaluation mode too."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def has_gradients(model: Model, x: Tensor) -> bool:
    """Whether the model's outputs can be traced back to the first sample of ``x``, or to its embedding."""
    one = x[:1].detach()
    try:
        with evaluating(model), gradients_of(model):
            layer = embedding_of(model, one) if is_ids(one) else None
            target = torch.zeros(1, dtype=torch.int64, device=one.device)
            gradient_at(model, one, target, one if layer is None else layer(one), layer)
    except ModelError:
        return False
    return True


def gradient_at(model: Model, x: Tensor, target: Tensor, at: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Gradient of the targets' outputs by the inputs ``at``; with a layer, by its output, which is ``at`` for inputs ``x``."""
    point = at.detach().requires_grad_()
    output = output_at(model, x, point, layer)
    (found,) = torch.autograd.grad(output.gather(1, target[:, None]).sum(), point)
    return found


def output_at(model: Model, x: Tensor, at: Tensor, layer: nn.Module | None = None) -> Tensor:
    """The model's output for inputs ``at``; with a layer, for inputs ``x`` when that layer's output is ``at``."""
    if layer is None:
        return model(at)
    hook = layer.register_forward_hook(lambda *_: at, prepend=True)  # so that hooks that note the output see this one
    try:
        return model(x)
    finally:
        hook.remove()


def outputs_of(model: Model, x: Tensor) -> Tensor:
    """(N, classes), without gradients.

    Raises:
        ModelError: the model gives something else.
    """
    with torch.no_grad():
        output = model(x)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(x):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"The model gives {found} for {len(x)} samples.", "Explain a model with outputs (N, classes).")
    return output


def targets_of(output: Tensor, target: Any) -> Tensor:
    """One class a sample (N,): those asked for, else those with the largest of the outputs (N, classes)."""
    if target is None:
        return output.argmax(1)
    chosen = torch.as_tensor(target, device=output.device).expand(len(output)).long()
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < output.shape[1]:
        raise ConfigError(f"target={target} is none of the {output.shape[1]} classes.", f"Take 0 … {output.shape[1] - 1}.")
    return chosen


def part_of(target: Tensor | int | None, part: slice) -> Tensor | int | None:
    """The targets of some of the samples."""
    return target[part] if isinstance(target, Tensor) and target.dim() else target


def embedding_of(model: Model, x: Tensor) -> nn.Module:
    """The first embedding that the model gives its ids to."""
    for layer in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(layer, nn.Embedding) and layer.num_embeddings > int(x.max()):
            return layer
    raise ModelError("Token ids are explained through an embedding, and this model has none.", 'Use method="occlusion".')


def convolution_of(model: Model, x: Tensor, name: str) -> nn.Module:
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
