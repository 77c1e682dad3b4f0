"""Distillation: a student learns what a teacher computes on the same batch.

:class:`Distillation` runs the teacher and adds its :class:`Term` s to the loss: :class:`SoftTargets` compares the outputs,
:class:`Features` and :class:`AttentionTransfer` outputs of layers, which forward hooks hand over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import ConfigError, ModelError, nearest
from workbench.probes.base import computing_again
from workbench.training.distillation_config import DISTILLATIONS, DistillConfig


class Term(nn.Module):
    """How far a student's tensor is from its teacher's: the mean over the batch, a scalar.

    One is made for the outputs, or one for every pair of layers. Its own parameters are trained with the student, and are no
    part of it.

    Args:
        student, teacher: what is to be compared, for one example batch.
    """

    compares: ClassVar[Literal["outputs", "layers"]]

    def __init__(self, student: Tensor, teacher: Tensor, config: DistillConfig) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how far the two are apart.")


class SoftTargets(Term):
    """Kullback-Leibler divergence of the student's softened probabilities from the teacher's (Hinton et al. 2015).

    ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))`` for logits [B, classes], arXiv:1503.02531 section 2.1; T² keeps
    the gradient's size independent of the temperature.
    """

    compares = "outputs"

    def __init__(self, student: Tensor, teacher: Tensor, config: DistillConfig) -> None:
        super().__init__(student, teacher, config)
        self.temperature = config.temperature
        if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] < 2:
            raise ModelError(
                f"Soft targets compare logits of the same classes; the student gives {list(student.shape)}, the teacher "
                f"{list(teacher.shape)}.",
                "Train both for the same classes, or take distill.terms={features: 1.0}.",
            )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = ((logits.float() / self.temperature).log_softmax(1) for logits in (student, teacher))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2


class Features(Term):
    """Mean squared difference of the outputs of two layers (Romero et al. 2014, FitNets, arXiv:1412.6550, equation 3).

    Where the student has fewer channels (the second dimension of images, else the last), a 1×1 convolution or linear layer
    between, trained along, maps its channels to the teacher's.
    """

    compares = "layers"

    def __init__(self, student: Tensor, teacher: Tensor, config: DistillConfig) -> None:
        super().__init__(student, teacher, config)
        axis = 1 if student.ndim == 4 else student.ndim - 1
        ours, theirs = student.shape[axis], teacher.shape[axis]
        if student.ndim != teacher.ndim or student.select(axis, 0).shape != teacher.select(axis, 0).shape:
            raise _unlike(student, teacher)
        self.project: nn.Module = nn.Identity()
        if ours != theirs:
            self.project = nn.Conv2d(ours, theirs, 1) if student.ndim == 4 else nn.Linear(ours, theirs)
        self.to(student.device)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(self.project(student).float(), teacher.float())


class AttentionTransfer(Term):
    """Squared distance of two layers' attention maps (Zagoruyko & Komodakis 2017, arXiv:1612.03928, equation 2).

    A map is the sum of squares over channels at each place, as a vector of length 1 per sample; numbers of channels may differ.
    The distance is between 0 and 2 whatever the resolution. The authors' weight of 1000 counts its mean over the places of a
    map: 16 here for maps of 8×8, 4 for 16×16.
    """

    compares = "layers"

    def __init__(self, student: Tensor, teacher: Tensor, config: DistillConfig) -> None:
        super().__init__(student, teacher, config)
        if student.ndim not in (3, 4) or self.map(student).shape != self.map(teacher).shape:
            raise _unlike(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.map(student) - self.map(teacher)).square().sum(1).mean()

    @staticmethod
    def map(x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, L, C] -> [B, places], each row of length 1."""
        squares = x.float().square().sum(1 if x.ndim == 4 else -1)
        return F.normalize(squares.flatten(1), dim=1)


class Distillation(nn.Module):
    """A teacher and the terms by which a student learns from it.

    Args:
        teacher: on the student's device; it stays as it is.
        student: hooks on its layers hand over their outputs while it trains; :meth:`detach` takes them off.
        x: an example batch, to see what the two give.

    Raises:
        ConfigError: no layer is named where one is needed, or none has that name.
        ModelError: what the two give cannot be compared, or one fails.
    """

    def __init__(self, config: DistillConfig, student: nn.Module, teacher: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.task = config.task
        self.teacher = teacher.eval().requires_grad_(False)
        kinds: dict[str, Any] = {name: DISTILLATIONS.factory(name) for name, weight in config.terms.items() if weight}
        deep = [name for name, kind in kinds.items() if kind.compares == "layers"]
        self._pairs = _pairs(config, student, teacher, deep) if deep else []
        ours, output = _seen(student, [pair[0] for pair in self._pairs], x)
        theirs, taught = _seen(teacher, [pair[1] for pair in self._pairs], x)
        self.outputs, self.layers = nn.ModuleList(), nn.ModuleList()
        self._output_weights: list[float] = []
        self._layer_weights: list[float] = []
        for name, kind in kinds.items():
            if kind.compares == "outputs":
                self.outputs.append(kind(output, taught, config))
                self._output_weights.append(config.terms[name])
            else:
                for mine, its in self._pairs:
                    with _naming(mine, its):
                        self.layers.append(kind(ours[mine].to(output.device), theirs[its], config))
                    self._layer_weights.append(config.terms[name])
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        modules, taught_modules = dict(student.named_modules()), dict(teacher.named_modules())
        self._handles = [modules[name].register_forward_hook(_keeper(self._ours, name, True)) for name, _ in self._pairs]
        self._handles += [
            taught_modules[name].register_forward_hook(_keeper(self._theirs, name, False)) for _, name in self._pairs
        ]

    def forward(self, x: Any, output: Tensor, loss: Tensor) -> Tensor:
        """The student's input, output and loss, just computed -> what is to be minimized."""
        with torch.no_grad():
            taught = self.teacher(x)
        total = self.task * loss
        for term, weight in zip(self.outputs, self._output_weights, strict=True):
            total = total + weight * term(output, taught)
        for index, (term, weight) in enumerate(zip(self.layers, self._layer_weights, strict=True)):
            mine, its = self._pairs[index % len(self._pairs)]
            total = total + weight * term(self._ours[mine].to(loss.device), self._theirs[its])
        self._ours.clear()
        self._theirs.clear()
        return total

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _pairs(config: DistillConfig, student: nn.Module, teacher: nn.Module, terms: Iterable[str]) -> list[tuple[str, str]]:
    """Names of the layers to compare, the student's and the teacher's."""
    known = [name for name, _ in student.named_modules() if name]
    if not config.layers:
        some = [name for name, module in student.named_children() for name in [name, *_children(name, module)]]
        raise ConfigError(
            f"distill.terms={', '.join(terms)} compare layers, but none is named.",
            f"Set distill.layers, e.g. some of {', '.join(some[:8])}." if some else "This student has no layers: take soft.",
        )
    mine = _matching(config.layers, known, "student")
    its = _matching(config.teacher_layers or mine, [name for name, _ in teacher.named_modules() if name], "teacher")
    if len(mine) != len(its):
        raise ConfigError(
            f"distill.layers are {len(mine)} ({', '.join(mine)}), distill.teacher_layers {len(its)} ({', '.join(its)}).",
            "Name as many of one as of the other.",
        )
    return list(zip(mine, its, strict=True))


def _children(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{child}" for child, _ in module.named_children()]


def _matching(patterns: Iterable[str], known: list[str], whose: str) -> list[str]:
    """The known names that each pattern means, in their own order."""
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in known if fnmatchcase(name, pattern) and name not in found]
        if not matching and pattern not in found:
            close = nearest(pattern, known)
            advice = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join(known[:8])} …"
            raise ConfigError(f"The {whose} has no layer {pattern!r}.", advice)
        found += matching
    return found


def _keeper(store: dict[str, Tensor], name: str, training: bool) -> Callable[..., None]:
    """A forward hook that keeps a layer's output while its module is in that mode."""

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        if module.training == training and not computing_again():
            store[name] = _tensor(output)

    return keep


def _tensor(output: Any) -> Tensor:
    """A layer's output, or the first of several."""
    value: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return value


@torch.no_grad()
def _seen(model: nn.Module, names: list[str], x: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    """Outputs of the named layers, and of the model, for one batch in evaluation mode."""
    seen: dict[str, Tensor] = {}
    modules, training = dict(model.named_modules()), model.training
    handles = [modules[name].register_forward_hook(_keeper(seen, name, False)) for name in names]
    model.eval()
    try:
        output = model(x)
    except Exception as error:
        raise ModelError(f"The teacher fails on the student's input: {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name in names:
        if not isinstance(seen.get(name), Tensor):
            given = type(seen[name]).__name__ if name in seen else "nothing: the model does not call it"
            raise ModelError(f"The layer {name!r} gives {given}, no tensor.", "Name another one, or take soft targets.")
    return seen, output


def _unlike(student: Tensor, teacher: Tensor) -> ModelError:
    return ModelError(
        f"Outputs of shape {list(student.shape)} and {list(teacher.shape)} cannot be compared.",
        "Name layers of the same resolution; numbers of channels may differ.",
    )


@contextmanager
def _naming(student: str, teacher: str) -> Iterator[None]:
    """Say in an error which layers it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{student} against the teacher's {teacher}: {error.what}", error.remedy) from None
