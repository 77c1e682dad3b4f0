"""Optimizers, schedules and gradient clipping.

Nouns: :class:`OptimConfig` and :func:`make_optimizer`; :class:`Schedule`, a function of the step alone;
:class:`AdaptiveGradientClipper`, which acts wherever an optimizer steps; :class:`DynamicGraphOptimizer`, whose step is
compiled where that pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from workbench.distributed import by_device, local, sum_over_columns, whole_norms
from workbench.optim_config import OPTIMIZERS, ClipConfig, OptimConfig, ScheduleConfig
from workbench.placement import to_device

AdamW = torch.optim.AdamW

__all__ = [
    "AdamW",
    "AdaptiveGradientClipper",
    "ClipConfig",
    "DynamicGraphOptimizer",
    "OptimConfig",
    "Schedule",
    "ScheduleConfig",
    "make_optimizer",
]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer for a model's trainable parameters.

    Vectors and scalars (biases, normalization) are spared weight decay unless ``decay_vectors``. On an accelerator the fused
    form is taken where there is one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1 or config.decay_vectors]
    vectors = [p for p in parameters if not (p.ndim > 1 or config.decay_vectors)]
    groups = [
        {"params": members, "weight_decay": decay}
        for kind, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        for members in _by_mesh(kind)
    ]
    arguments: dict[str, Any] = {"lr": config.lr, **config.args}
    if config.name in ("sgd", "rmsprop"):
        arguments.setdefault("momentum", config.momentum)
    if config.name == "sgd":
        arguments.setdefault("nesterov", config.momentum > 0)
    if config.name in ("sgd", "adam", "adamw") and any(p.is_cuda for p in parameters):
        arguments.setdefault("fused", True)
    optimizer: torch.optim.Optimizer = OPTIMIZERS.create(config.name, groups, **arguments)
    return optimizer


def _by_mesh(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Those spread over one mesh together: one operation on many tensors takes no others."""
    found: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return found.values()


class Schedule:
    """Learning rate by step: linear warm-up, then constant, cosine, linear or step decay to ``final`` × the peak.

    A function of the step alone, so that resuming needs no state but :attr:`scale`, by which ``Run.set(lr=…)`` changes it.
    """

    def __init__(self, config: ScheduleConfig, peak: float, total_steps: int) -> None:
        self.config, self.peak, self.total_steps = config, peak, total_steps
        self.warmup = round(config.warmup * total_steps)
        self.scale = 1.0

    def factor(self, step: int) -> float:
        """Multiple of the peak rate used by the optimizer step number ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total_steps - self.warmup)
        final = self.config.final
        match self.config.name:
            case "cosine":
                return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return 1 - (1 - final) * done
            case "step":
                return float(0.1 ** sum(done >= milestone for milestone in self.config.milestones))
        return 1.0

    def rate(self, step: int) -> float:
        """The rate of the optimizer step number ``step``, counted from 0."""
        return self.peak * self.scale * self.factor(step)

    def set_peak(self, peak: float) -> None:
        """Go on as if ``peak`` had been the peak rate from the start."""
        self.scale = peak / self.peak

    def set_rate(self, rate: float, step: int) -> None:
        """From ``step`` on, go on in proportion so that this step's rate is ``rate``."""
        self.scale = rate / (self.peak * max(self.factor(step), 1e-12))


class AdaptiveGradientClipper:
    """Clip gradients where an optimizer steps, by a threshold that may follow the running norm.

    >>> clipper = AdaptiveGradientClipper(max_norm=1.0, mode="dynamic")
    >>> with clipper:
    ...     loss.backward()
    ...     optimizer.step()

    The context needs no parameters: it acts through PyTorch's global optimizer-step pre-hook, so also with fused, scaled and
    compiled steps. Nothing is read back to the host.

    Args:
        max_norm: ``fixed``: the largest L2 norm of all gradients together. ``dynamic``: the same; below it the threshold
            follows the running norm. ``agc``: the largest ratio of gradient to parameter norm, by output unit.
        mode: ``fixed`` (Pascanu et al. 2013, arXiv:1211.5063), ``dynamic`` (mean + ``deviations`` standard deviations of the
            running norm, as ZClip, Kumar et al. 2025, arXiv:2504.02507) or ``agc`` (Brock et al. 2021, arXiv:2102.06171).
        decay: of the running mean and variance of the norm, per step.
        deviations: standard deviations above the mean at which ``dynamic`` clips.
        warmup: steps before ``dynamic`` goes below ``max_norm``.
    """

    def __init__(
        self,
        max_norm: float = 1.0,
        mode: Literal["fixed", "dynamic", "agc"] = "dynamic",
        *,
        decay: float = 0.97,
        deviations: float = 2.5,
        warmup: int = 25,
    ) -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} must be positive: gradients are scaled down to at most this norm.")
        if mode not in ("fixed", "dynamic", "agc"):
            raise ValueError(f"mode={mode!r} must be 'fixed', 'dynamic' or 'agc'.")
        self.max_norm, self.mode = max_norm, mode
        self.decay, self.deviations, self.warmup = decay, deviations, warmup
        self.state: Tensor | None = None
        """float32 [3]: steps seen, running mean, running mean square of the norm; on the first gradient's device."""
        self.others: torch.distributed.ProcessGroup | None = None
        """Ranks that hold other parameters of the same model."""
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> AdaptiveGradientClipper:
        self._handle = register_optimizer_step_pre_hook(self._before_step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # A scaler hands its scale to fused optimizers instead of unscaling the gradients itself.
        self.clip(parameters, getattr(optimizer, "grad_scale", None))

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], scale: Tensor | None = None) -> None:
        """Scale the gradients of ``parameters`` in place.

        Args:
            scale: factor by which the gradients are too large (loss scaling), a scalar tensor.
        """
        owners = [p for p in parameters if p.grad is not None]
        if not owners:
            return
        gradients = [p.grad for p in owners if p.grad is not None]
        if self.mode == "agc":
            self._clip_by_unit(owners, gradients, scale)
            return
        norm = torch.linalg.vector_norm(whole_norms(gradients))
        if self.others is not None:
            square = norm.double().square()
            torch.distributed.all_reduce(square, group=self.others)
            norm = square.sqrt().to(norm.dtype)
        if scale is not None:
            norm = norm / to_device(scale, norm.device)
        factor = (self._threshold(norm) / (norm + 1e-6)).clamp(max=1.0)
        for (parts,) in by_device([local(gradient) for gradient in gradients]):
            torch._foreach_mul_(parts, to_device(factor, parts[0].device))

    def _threshold(self, norm: Tensor) -> Tensor:
        if self.mode == "fixed":
            return torch.full_like(norm, self.max_norm)
        if self.state is None:
            self.state = torch.zeros(3, device=norm.device)
        state = to_device(self.state, norm.device)
        seen, mean, square = state.unbind()
        deviation = (square - mean * mean).clamp(min=0).sqrt()
        ceiling = torch.full_like(norm, self.max_norm)
        threshold = torch.where(seen < self.warmup, ceiling, torch.minimum(mean + self.deviations * deviation, ceiling))
        kept = torch.minimum(norm, threshold)  # what was clipped must not raise the threshold
        weight = torch.maximum(1 / (seen + 1), torch.full_like(seen, 1 - self.decay))
        finite = torch.isfinite(norm)
        updated = torch.stack([seen + 1, mean + weight * (kept - mean), square + weight * (kept * kept - square)])
        self.state = torch.where(finite, updated, state)
        return threshold

    def _clip_by_unit(self, owners: list[Tensor], gradients: list[Tensor], scale: Tensor | None) -> None:
        for gradient, weight_norm, norm in zip(gradients, _unit_norms(owners), _unit_norms(gradients), strict=True):
            largest = self.max_norm * weight_norm.clamp(min=1e-3)
            if scale is not None:
                norm = norm / to_device(scale, norm.device)
            part = local(gradient)
            part.mul_((largest / norm.clamp(min=1e-6)).clamp(max=1.0).to(part.dtype))


def _unit_norms(values: list[Tensor]) -> Iterator[Tensor]:
    """L2 norms by output unit (first dimension), shaped to broadcast over this rank's units; of the whole for vectors."""
    of_vectors: dict[int, Tensor] = {}
    for (vectors,) in by_device([value for value in values if value.ndim <= 1]):
        of_vectors |= zip(map(id, vectors), whole_norms(vectors), strict=True)
    for value in values:
        if value.ndim <= 1:
            yield of_vectors[id(value)]
        else:
            norm = torch.linalg.vector_norm(local(value), dim=tuple(range(1, value.ndim)), keepdim=True, dtype=torch.float32)
            yield sum_over_columns(norm.square(), value).sqrt() if hasattr(value, "device_mesh") else norm


class DynamicGraphOptimizer(torch.optim.AdamW):
    """AdamW whose step runs eagerly while you debug and as one compiled graph when you don't.

    >>> optimizer = DynamicGraphOptimizer(model.parameters(), lr=1e-3)
    >>> for x, y in batches:
    ...     optimizer.zero_grad()
    ...     loss_function(model(x), y).backward()
    ...     optimizer.step()

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a multiple per step.
        graph: ``eager``; ``compiled``: ``torch.compile`` of the step; ``auto``: compiled on an accelerator without a fused form.
        **options: of :class:`torch.optim.AdamW`.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, graph: Literal["auto", "eager", "compiled"] = "auto", **options: Any
    ) -> None:
        if graph not in ("auto", "eager", "compiled"):
            raise ValueError(f"graph={graph!r} must be 'auto', 'eager' or 'compiled'.")
        if graph == "compiled":
            lr_value: Any = torch.tensor(lr)  # a number would be baked into the graph and recompiled at each change
            options.setdefault("capturable", False)
        else:
            lr_value = lr
        super().__init__(params, lr=lr_value, **options)
        self.graph = graph
        self._update = _unhooked(torch.optim.AdamW.step)
        if graph == "compiled":
            self._update = torch.compile(self._update)

    def step(self, closure: Any = None) -> Any:
        """One update; the loss that ``closure`` returns, if given."""
        return self._update(self, closure)


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without the wrapper that runs hooks: the subclass's own step runs them, and once is enough."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step
